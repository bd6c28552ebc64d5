"""Checks a project: label config, connection, webhook, image."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from ml_backend.detection.decoding import UndecodableImage
from ml_backend.detection.device import DeviceError, resolve_device
from ml_backend.detection.presets import preset_named
from ml_backend.doctor.finding import Examined, Finding, found
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.controls.base import Control
from ml_backend.label_studio.errors import GUARD, Forbidden, LabelStudioError
from ml_backend.label_studio.events import ProjectInfo
from ml_backend.label_studio.images import ImageUnavailable
from ml_backend.label_studio.label_config import (
    LabelConfig,
    LabelConfigError,
    match_labels,
    parse_label_config,
)
from ml_backend.label_studio.media import media_of, read_image
from ml_backend.projects.connect import (
    connection_fields,
    has_credentials,
    own_connections,
    webhook_headers,
)
from ml_backend.remedies import with_remedy
from ml_backend.store.tables import Project, now

_HEARD_WITHIN = 5.0
"""Seconds in which a webhook that was asked for arrives."""


def project(backend: Examined, client: LabelStudioClient, number: int) -> Iterator[Finding]:
    """Checks a project: label config, connection, webhook, and whether an image can be read."""
    try:
        info = client.project(number)
    except LabelStudioError as error:
        yield found("project", "error", "project_unreadable", detail=str(error))
        return
    yield found("project", "ok", "project", project=number, title=info.title)
    try:
        config = parse_label_config(info.label_config)
    except LabelConfigError as error:
        yield found("label config", "error", "label_config_unusable", detail=str(error))
        return
    yield found("label config", "ok", "label_config", labels=list(config.labels))
    with backend.database.reading() as session:
        project = session.query(Project).filter_by(key=info.key).one_or_none()
    if project is None or project.live_version is None:
        yield from _known_labels(backend, config)
    again: dict[str, Any] = {"project": number}
    ours = (
        own_connections(client, project, backend.settings, backend.database)
        if project is not None
        else []
    )
    url = project.connection_url if project is not None else None
    if url is None and ours:
        # Added by hand in Label Studio's page; `connect` repairs it where it is.
        url = ours[0]["url"].rstrip("/")
        again["by_hand"] = True
    again["url"] = url
    if project is None or url is None:
        yield found("connection", "error", "not_connected", **again)
        return
    yield _connection(backend, client, info, project, ours, url, again)
    yield from _webhook(backend, client, info, project, url, again)
    yield _image(backend, client, project, config.controls[0])


def _known_labels(backend: Examined, config: LabelConfig) -> Iterator[Finding]:
    """Lists the labels that COCO's weights know, which serve until the first training."""
    try:
        device = resolve_device(backend.settings.device)
        known = preset_named(backend.settings.preset, device).architecture.published_labels
    except (DeviceError, ValueError):
        # The checks of device and weights have reported the error already.
        return
    if known is None or backend.settings.weights == "none":
        return
    match = match_labels(config, known)
    values = {
        "known": list(match.matched),
        "unknown": list(match.unmatched),
        "mistaken": list(match.mistaken),
        "detail": match.in_words("COCO's weights"),
    }
    if match.mistaken:
        yield found("known labels", "warning", "known_labels_mistaken", **values)
    else:
        yield found("known labels", "ok", "known_labels", **values)


def _connection(
    backend: Examined,
    client: LabelStudioClient,
    info: ProjectInfo,
    project: Project,
    ours: Sequence[dict[str, Any]],
    url: str,
    again: dict[str, Any],
) -> Finding:
    if not ours:
        return found("connection", "error", "address_not_connected", **again)
    if project.connection_url is None and not has_credentials(ours[0], backend.settings):
        return found("connection", "error", "connection_lacks_credentials", **again)
    version = project.version
    try:
        # Label Studio checks address, health and setup whenever a connection is written.
        fields = connection_fields(backend.settings, info.id, ours[0]["url"], ours[0]["title"])
        client.update_ml_backend(ours[0]["id"], **fields)
    except LabelStudioError as error:
        # The text of a `Forbidden` names its remedy.
        code = "refused" if isinstance(error, Forbidden) else "unreachable"
        return found(
            "connection",
            "error",
            f"connection_{code}",
            address=ours[0]["url"],
            detail=str(error),
        )
    if not (ours[0]["title"].startswith(version) and info.model_version == ours[0]["title"]):
        return found(
            "connection",
            "warning",
            "connection_title",
            title=ours[0]["title"],
            model_version=info.model_version,
            version=version,
            **again,
        )
    return found("connection", "ok", "connection", url=ours[0]["url"], version=version)


def _webhook(
    backend: Examined,
    client: LabelStudioClient,
    info: ProjectInfo,
    project: Project,
    url: str,
    again: dict[str, Any],
) -> Iterator[Finding]:
    address = f"{url}/webhook"
    ours = [w for w in client.webhooks(info.id) if w["url"] == address]
    if not ours:
        yield found("webhook", "error", "webhook_missing", address=address, **again)
        return
    right = webhook_headers(backend.settings)
    if len(ours) > 1 or not ours[0]["is_active"] or ours[0].get("headers", {}) != right:
        yield found("webhook", "error", "webhook_wrong", address=address, **again)
        return
    yield found("webhook", "ok", "webhook", address=address)
    # Writing the unchanged title makes Label Studio send PROJECT_UPDATED.
    asked_at = now()
    client.update_project(info.id, title=info.title)
    until = time.monotonic() + _HEARD_WITHIN
    while time.monotonic() < until:
        with backend.database.reading() as session:
            heard = session.get_one(Project, project.id).heard_at
        if heard is not None and heard >= asked_at:
            yield found("heard from", "ok", "heard_from")
            return
        time.sleep(0.2)
    last = project.heard_at.isoformat(timespec="seconds") if project.heard_at else None
    yield found("heard from", "error", "not_heard_from", last=last, remedy=GUARD)


def _image(
    backend: Examined, client: LabelStudioClient, project: Project, control: Control
) -> Finding:
    task = client.first_task(project.label_studio_id)
    if task is None:
        return found("image", "warning", "no_task")
    try:
        value = media_of(task["data"], control)
    except ImageUnavailable as error:
        return found("image", "error", "no_image_in_task", task=task["id"], detail=str(error))
    images = backend.label_studios.images(project)
    route = images.route_of(value)
    try:
        image = read_image(images, task, control, max_pixels=backend.settings.image_max_pixels)
    except (ImageUnavailable, UndecodableImage) as error:
        return found(
            "image",
            "error",
            "image_unreadable",
            task=task["id"],
            route=route,
            detail=with_remedy(error),
        )
    return found(
        "image",
        "ok",
        "image",
        task=task["id"],
        width=image.width,
        height=image.height,
        route=route,
    )
