"""Looks at everything that must be right, and says of what is not what to do."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import requests
import torch
from sqlalchemy import select

from ml_backend.detection.decoding import UndecodableImage, decode_image
from ml_backend.detection.detector import CorruptDetector, Detector
from ml_backend.detection.device import DeviceError, describe_device, resolve_device
from ml_backend.detection.presets import preset_named
from ml_backend.label_studio.client import GUARD, Forbidden, LabelStudioClient, LabelStudioError
from ml_backend.label_studio.events import ProjectInfo
from ml_backend.label_studio.images import ImageUnavailable
from ml_backend.label_studio.label_config import (
    LabelConfig,
    LabelConfigError,
    match_labels,
    parse_label_config,
)
from ml_backend.projects.clients import LabelStudios
from ml_backend.projects.connect import (
    connection_fields,
    has_credentials,
    own_connections,
    webhook_headers,
)
from ml_backend.remedies import with_remedy
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.registry import Registry, VersionMissing
from ml_backend.store.tables import Project, now
from ml_backend.training.artefact import load_artefact

_ENOUGH_DISK = 2 * 2**30
_HEARD_WITHIN = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: what was looked at.
        status: `ok`, `warning` or `error`.
        detail: what was found.
        remedy: what to do, where something is to be done.
    """

    what: str
    status: Literal["ok", "warning", "error"]
    detail: str
    remedy: str = ""


class Doctor:
    """Examines a backend and, where one is named, a project."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        registry: Registry,
        label_studios: LabelStudios,
    ) -> None:
        self._settings = settings
        self._database = database
        self._registry = registry
        self._label_studios = label_studios

    def _of_late(self) -> Iterator[Finding]:
        """What server and worker met with: they may reach what we do not, and the other way."""
        for contact in self._label_studios.contacts.all():
            if contact.failing_since is not None:
                yield Finding(
                    "requests",
                    "warning",
                    f"those to {contact.url} fail since {contact.failing_since:%Y-%m-%d %H:%M:%S} "
                    f"UTC: {contact.detail}",
                    "what waits for it goes on by itself once it does what is asked",
                )

    def _live_versions(self) -> Iterator[Finding]:
        """Whether what is live can be loaded: where not, the version before serves."""
        with self._database.reading() as session:
            projects = session.scalars(select(Project).where(Project.live_version.is_not(None)))
            live = [(p.key, p.live_version or "") for p in projects]
        for key, version in live:
            try:
                load_artefact(self._registry.existing(key, version), torch.device("cpu"))
            except (VersionMissing, CorruptDetector) as error:
                yield Finding(
                    "live version",
                    "error",
                    f"project {key}: {version} cannot serve; an earlier one does, where there is "
                    f"one: {error}",
                    "restore the folder (it is tried again within a minute), or "
                    f"`ml-backend rollback -p {key}`",
                )
            else:
                yield Finding("live version", "ok", f"project {key}: {version} loads")

    def examine(self, project: int | None) -> Iterator[Finding]:
        """Yields what it finds, as it finds it.

        Args:
            project: Label Studio's id of a project to look at.
        """
        yield self._disk()
        yield self._device()
        yield self._weights()
        yield self._server()
        yield from self._live_versions()
        client = self._label_studios.default()
        if client is None:
            missing = [
                name
                for name, value in (
                    ("LABEL_STUDIO_URL", self._settings.label_studio_url),
                    ("LABEL_STUDIO_API_KEY", self._settings.label_studio_api_key),
                )
                if not value
            ]
            yield Finding(
                "Label Studio",
                "error",
                f"{' and '.join(missing)} not set",
                "set them: the token stands in Label Studio under Account & Settings",
            )
            return
        reached = self._reach(client)
        yield from reached
        yield from self._of_late()
        if project is None or any(f.status == "error" for f in reached):
            return
        yield from self._project(client, project)

    def _disk(self) -> Finding:
        free = shutil.disk_usage(self._settings.model_dir).free
        where = f"{free / 2**30:.1f} GiB free in {self._settings.model_dir}"
        if free < _ENOUGH_DISK:
            return Finding(
                "disk",
                "warning",
                where,
                "make room, or set MODEL_DIR to a larger disk, or a smaller "
                "ML_BACKEND_IMAGE_CACHE_BYTES",
            )
        return Finding("disk", "ok", where)

    def _device(self) -> Finding:
        try:
            device = resolve_device(self._settings.device)
        except DeviceError as error:
            return Finding("device", "error", with_remedy(error))
        described = ", ".join(str(value) for value in describe_device(device).values())
        return Finding("device", "ok", described)

    def _weights(self) -> Finding:
        if self._settings.weights == "none":
            return Finding("weights", "ok", "none, as set: trainings start from nothing")
        try:
            device = resolve_device("cpu")
            preset = preset_named(self._settings.preset, resolve_device(self._settings.device))
            loaded = Detector.pretrained(
                preset, ("object",), self._settings.weights, device
            ).weights
        except (DeviceError, ValueError, OSError) as error:
            return Finding("weights", "error", with_remedy(error), "see ML_BACKEND_WEIGHTS")
        if loaded.kind == "none":
            return Finding(
                "weights",
                "warning",
                f"{preset.name}: {loaded.detail}",
                "allow the download, or set ML_BACKEND_WEIGHTS to a file; without, trainings "
                "start from nothing and need more annotations",
            )
        return Finding("weights", "ok", f"{preset.name}: {loaded.detail}")

    def _server(self) -> Finding:
        url = self._settings.own_url
        try:
            requests.get(f"{url}/health", timeout=2).raise_for_status()
        except requests.RequestException as error:
            return Finding(
                "server",
                "error",
                f"{url} does not answer ({type(error).__name__})",
                "start it: `ml-backend serve`",
            )
        return Finding("server", "ok", f"{url} is up")

    def _reach(self, client: LabelStudioClient) -> list[Finding]:
        try:
            version = client.version()
        except LabelStudioError as error:
            return [Finding("Label Studio", "error", str(error), "check LABEL_STUDIO_URL")]
        found = [Finding("Label Studio", "ok", f"{client.url} answers, version {version}")]
        try:
            who = client.whoami()
        except LabelStudioError as error:
            found.append(Finding("token", "error", str(error), "check LABEL_STUDIO_API_KEY"))
        else:
            found.append(Finding("token", "ok", f"it is {who.get('email', 'valid')}'s"))
        return found

    def _project(self, client: LabelStudioClient, number: int) -> Iterator[Finding]:
        try:
            info = client.project(number)
        except LabelStudioError as error:
            yield Finding("project", "error", str(error), "check the number, and whose token it is")
            return
        yield Finding("project", "ok", f"{number} is {info.title!r}")
        try:
            config = parse_label_config(info.label_config)
        except LabelConfigError as error:
            yield Finding("label config", "error", str(error), "change it in Label Studio")
            return
        yield Finding("label config", "ok", "labels: " + ", ".join(config.labels))
        with self._database.reading() as session:
            project = session.query(Project).filter_by(key=info.key).one_or_none()
        if project is None or project.live_version is None:
            yield from self._known_labels(config)
        again = f"ml-backend connect --project {number}"
        ours = (
            own_connections(client, project, self._settings, self._database)
            if project is not None
            else []
        )
        url = project.connection_url if project is not None else None
        if url is None and ours:
            # Added by hand in Label Studio's page; `connect` repairs it where it is.
            url = ours[0]["url"].rstrip("/")
            again += f" --url {url}"
        if project is None or url is None:
            yield Finding("connection", "error", "the project is not connected", again)
            return
        yield self._connection(client, info, project, ours, url, again)
        yield from self._webhook(client, info, project, url, again)
        yield self._image(client, project, tuple(config.controls_by_image()))

    def _known_labels(self, config: LabelConfig) -> Iterator[Finding]:
        """What COCO's weights, which serve until the first training, know of the labels."""
        try:
            device = resolve_device(self._settings.device)
            known = preset_named(self._settings.preset, device).architecture.published_labels
        except (DeviceError, ValueError):
            # Said already, of the device or of the weights.
            return
        if known is None or self._settings.weights == "none":
            return
        match = match_labels(config, known)
        words = match.in_words("COCO's weights")
        if match.mistaken:
            yield Finding("known labels", "warning", words, "change predicted_values in the config")
        else:
            yield Finding("known labels", "ok", words)

    def _connection(
        self,
        client: LabelStudioClient,
        info: ProjectInfo,
        project: Project,
        ours: Sequence[dict[str, Any]],
        url: str,
        again: str,
    ) -> Finding:
        if not ours:
            return Finding("connection", "error", f"{url} is not connected", again)
        if project.connection_url is None and not has_credentials(ours[0], self._settings):
            return Finding(
                "connection",
                "error",
                f"{url} was added by hand, and lacks the credentials (BASIC_AUTH_USER and _PASS)",
                again,
            )
        version = project.version
        try:
            # Label Studio checks address, health and setup whenever a connection is written.
            fields = connection_fields(self._settings, info.id, ours[0]["url"], ours[0]["title"])
            client.update_ml_backend(ours[0]["id"], **fields)
        except LabelStudioError as error:
            return Finding(
                "connection",
                "error",
                f"Label Studio does not reach {ours[0]['url']}: {error}",
                ""
                if isinstance(error, Forbidden)
                else "check the address given to `connect --url`",
            )
        if not (ours[0]["title"].startswith(version) and info.model_version == ours[0]["title"]):
            return Finding(
                "connection",
                "warning",
                f"its title is {ours[0]['title']!r}, the project's model version "
                f"{info.model_version!r}, ours {version!r}: the next task is chosen at random",
                again,
            )
        return Finding(
            "connection", "ok", f"Label Studio reaches {ours[0]['url']}, titled {version}"
        )

    def _webhook(
        self,
        client: LabelStudioClient,
        info: ProjectInfo,
        project: Project,
        url: str,
        again: str,
    ) -> Iterator[Finding]:
        address = f"{url}/webhook"
        ours = [w for w in client.webhooks(info.id) if w["url"] == address]
        if not ours:
            yield Finding("webhook", "error", f"there is none to {address}", again)
            return
        right = webhook_headers(self._settings)
        if len(ours) > 1 or not ours[0]["is_active"] or ours[0].get("headers", {}) != right:
            yield Finding(
                "webhook",
                "error",
                "it is there more than once, off, or lacks the credentials or the secret",
                again,
            )
            return
        yield Finding("webhook", "ok", f"Label Studio has one to {address}")
        # Saying the project's title again makes Label Studio send PROJECT_UPDATED.
        asked_at = now()
        client.update_project(info.id, title=info.title)
        until = time.monotonic() + _HEARD_WITHIN
        while time.monotonic() < until:
            with self._database.reading() as session:
                heard = session.get_one(Project, project.id).heard_at
            if heard is not None and heard >= asked_at:
                yield Finding("heard from", "ok", "a webhook arrived just now, on request")
                return
            time.sleep(0.2)
        last = project.heard_at.isoformat(timespec="seconds") if project.heard_at else "never"
        yield Finding(
            "heard from",
            "error",
            f"a webhook that was asked for did not arrive; last heard from: {last}",
            GUARD,
        )

    def _image(
        self, client: LabelStudioClient, project: Project, data_keys: tuple[str, ...]
    ) -> Finding:
        task = client.first_task(project.label_studio_id)
        if task is None:
            return Finding("image", "warning", "the project has no task yet", "import images")
        value = task["data"].get(data_keys[0])
        if not isinstance(value, str):
            return Finding(
                "image",
                "error",
                f"task {task['id']} has no image under {data_keys[0]!r}",
                'the label config\'s value="$..." must name a field of the tasks',
            )
        images = self._label_studios.images(project)
        route = images.route_of(value)
        try:
            content = images.fetch(task["id"], value)
            image = decode_image(content, max_pixels=self._settings.image_max_pixels)
        except (ImageUnavailable, UndecodableImage) as error:
            words = with_remedy(error)
            return Finding("image", "error", f"task {task['id']}, {route}: {words}")
        return Finding("image", "ok", f"task {task['id']}: {image.width} x {image.height}, {route}")
