"""Connects a project in one go, or repairs its connection; doing it again changes nothing."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from urllib3.exceptions import LocationParseError

from ml_backend.label_studio.addresses import origin_of
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.projects.counts import annotated_tasks
from ml_backend.projects.ingest import Ingest
from ml_backend.projects.reconcile import reconcile
from ml_backend.reasons import Reason
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import PRETRAINED, UNTRAINED, ModelVersion, Project

SECRET_HEADER = "X-ML-Backend-Secret"  # noqa: S105
"""Header in which Label Studio's webhooks carry `ML_BACKEND_WEBHOOK_SECRET`."""
SAMPLING = "Uncertainty sampling"


@dataclass(slots=True)
class Connected:
    """Holds the outcome of connecting a project.

    Attributes:
        row: the project's row.
        project: its key.
        version: the version that its connection is titled with.
        annotated: its annotated tasks, once all was read back.
        steps: what was done, in order.
    """

    row: int
    project: str
    version: str
    annotated: int = 0
    steps: list[Reason] = field(default_factory=list)

    def add(self, code: str, **values: Any) -> None:
        """Adds a step."""
        self.steps.append(Reason(f"connect.{code}", values))


def webhook_headers(settings: Settings) -> dict[str, str]:
    """Makes the headers that Label Studio's webhooks must carry to be let in here."""
    headers: dict[str, str] = {}
    if settings.webhook_secret is not None:
        headers[SECRET_HEADER] = settings.webhook_secret.get_secret_value()
    if settings.basic_auth is not None:
        credentials = ":".join(settings.basic_auth)
        headers["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    return headers


def connection_fields(settings: Settings, project: int, url: str, title: str) -> dict[str, Any]:
    """Makes all fields of a connection, as they are written to Label Studio.

    Label Studio tries a connection whenever it is written, with the credentials that are written:
    it does not use the stored ones, and does not show them.

    Args:
        settings: the credentials.
        project: Label Studio's id of the project.
        url: this backend's address.
        title: the version.
    """
    fields = {"url": url, "title": title, "project": project, "auth_method": "NONE"}
    if settings.basic_auth is not None:
        user, password = settings.basic_auth
        fields |= {
            "auth_method": "BASIC_AUTH",
            "basic_auth_user": user,
            "basic_auth_pass": password,
        }
    return fields


def own_connections(
    client: LabelStudioClient, project: Project, settings: Settings, database: Database
) -> list[dict[str, Any]]:
    """Finds the connections of a project that lead here; others are never touched.

    A connection that was added by hand in Label Studio's page is recognised by the answer of its
    address: each time connections are listed, Label Studio asks their `/setup` and shows the
    answer as `model_version`. A connection with another answer is not ours, whatever its title and
    address: every backend's port is 9090, and Label Studio's localhost may be another machine.
    Title or address decide only where nothing was ever answered.
    """
    found = client.ml_backends(project.label_studio_id)
    if project.connection_url is not None:
        return [c for c in found if c["url"].rstrip("/") == project.connection_url]
    with database.reading() as session:
        names = {UNTRAINED, PRETRAINED} | set(
            session.scalars(select(ModelVersion.name).where(ModelVersion.project_id == project.id))
        )
    own = _host_and_port(settings.own_url)

    def leads_here(connection: dict[str, Any]) -> bool:
        if answered := connection.get("model_version"):
            return answered in names
        return connection.get("title") in names or _host_and_port(connection["url"]) == own

    return [c for c in found if leads_here(c)]


def has_credentials(connection: dict[str, Any], settings: Settings) -> bool:
    """Tells whether a connection that was added by hand has the user of our basic authentication.

    A connection without that user gets no password from us: it may lead to another server that
    answers as we do. One that leads here could not have been saved without the credentials.
    """
    if settings.basic_auth is None:
        return True
    return bool(connection.get("basic_auth_user") == settings.basic_auth[0])


def _host_and_port(url: str) -> tuple[str | None, int | None] | None:
    try:
        _, host, port = origin_of(url)
    except LocationParseError:
        return None
    return "localhost" if host in {"127.0.0.1", "::1"} else host, port


def connect(
    client: LabelStudioClient,
    label_studio_id: int,
    url: str | None,
    settings: Settings,
    database: Database,
    ingest: Ingest,
) -> Connected:
    """Connects this backend to a project, and reads back what was annotated before.

    Args:
        client: of the Label Studio that holds it.
        label_studio_id: the project's id there.
        url: this backend's address, as Label Studio reaches it; by default the one that the
            project was connected with, or else the settings'.
        settings: credentials and the webhook's secret.
        database: remembers the address.
        ingest: makes the project known.

    Raises:
        LabelStudioError: Label Studio refuses, or could not be read; the text says why and what to
            do. What was done by then stays: doing it again goes on.
        LabelConfigError: the label config has nothing to detect.
    """
    info = client.project(label_studio_id)
    parse_label_config(info.label_config)
    project = ingest.introduce(info.key, info.id, label_config=info.label_config)
    with database.session() as session:
        stored = session.get_one(Project, project.id)
        stored.title = info.title
        stored.is_default = True
    url = (url or stored.connection_url or settings.own_url).rstrip("/")
    # A connection under a former address is changed; otherwise it would stay beside the new one.
    known = {url, stored.connection_url or url}
    done = Connected(project.id, info.key, project.version)
    _connection(client, label_studio_id, url, known, settings, done)
    _webhook(client, label_studio_id, url, known, settings, done)
    _project(client, label_studio_id, done)
    with database.session() as session:
        session.get_one(Project, project.id).connection_url = url
    # Read back after the webhook was created, so that no annotation in between is missed.
    with database.reading() as session:
        project = session.get_one(Project, project.id)
    reconcile(project, client, database, ingest)
    with database.reading() as session:
        done.annotated = annotated_tasks(session, project.id)
    done.add("read_back", annotated=done.annotated)
    return done


def _connection(
    client: LabelStudioClient,
    project: int,
    url: str,
    known: set[str],
    settings: Settings,
    done: Connected,
) -> None:
    fields = connection_fields(settings, project, url, done.version)
    before = _ours(client, project, known)
    for double in before[1:]:
        client.delete_ml_backend(double["id"])
        done.add("double_connection", connection=double["id"])
    if not before:
        client.add_ml_backend(**fields)
    else:
        client.update_ml_backend(before[0]["id"], **fields)
    # The running server knows whether COCO's weights serve before the first training.
    for connection in _ours(client, project, {url}):
        told = connection.get("model_version")
        if told and told != done.version:
            done.version = str(told)
            client.update_ml_backend(connection["id"], **fields | {"title": done.version})
    done.add("was_connected" if before else "connected", url=url, version=done.version)


def _ours(client: LabelStudioClient, project: int, known: set[str]) -> list[dict[str, Any]]:
    return [b for b in client.ml_backends(project) if b["url"].rstrip("/") in known]


def _webhook(
    client: LabelStudioClient,
    project: int,
    url: str,
    known: set[str],
    settings: Settings,
    done: Connected,
) -> None:
    address = f"{url}/webhook"
    wanted: dict[str, Any] = {
        "url": address,
        "project": project,
        "headers": webhook_headers(settings),
        "is_active": True,
        "send_payload": True,
        "send_for_all_actions": True,
    }
    addresses = {f"{url}/webhook" for url in known}
    ours = [w for w in client.webhooks(project) if w["url"] in addresses]
    if not ours:
        client.create_webhook(**wanted)
        done.add("webhook_created")
        return
    first, *others = ours
    for double in others:
        client.delete_webhook(double["id"])
        done.add("double_webhook", webhook=double["id"])
    if any(first.get(name) != value for name, value in wanted.items()):
        client.update_webhook(first["id"], **wanted)
        done.add("webhook_repaired")
    else:
        done.add("webhook_right")


def _project(client: LabelStudioClient, project: int, done: Connected) -> None:
    client.update_project(
        project,
        sampling=SAMPLING,
        show_collab_predictions=True,
        # It must equal the connection's title, or Label Studio orders tasks by no score.
        model_version=done.version,
    )
    done.add("project_set")
