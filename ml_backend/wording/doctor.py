"""Words the findings of the doctor, and the remedies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_backend.reasons import Reason

_START = "start it: `ml-backend serve`"


def _again(v: Mapping[str, Any]) -> str:
    """Names the command that connects the project again."""
    address = f" --url {v['url']}" if v.get("by_hand") else ""
    return f"ml-backend connect --project {v['project']}{address}"


WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    # The machine.
    "doctor.disk_free": lambda v: f"{v['gib']:.1f} GiB free in {v['folder']}",
    "doctor.disk_low": lambda v: f"{v['gib']:.1f} GiB free in {v['folder']}",
    "doctor.device": lambda v: str(v["device"]),
    "doctor.device_unusable": lambda v: str(v["detail"]),
    "doctor.weights": lambda v: f"{v['preset']}: {v['detail']}",
    "doctor.weights_none_set": lambda v: "none, as set: trainings start from nothing",
    "doctor.weights_missing": lambda v: f"{v['preset']}: {v['detail']}",
    "doctor.weights_unusable": lambda v: str(v["detail"]),
    "doctor.artefacts": lambda v: str(v["detail"]),
    "doctor.artefacts_unavailable": lambda v: str(v["detail"]),
    "doctor.version_loads": lambda v: f"project {v['project']}: {v['version']} loads",
    "doctor.version_unloadable": lambda v: (
        f"project {v['project']}: {v['version']} cannot serve; an earlier one does, where there is "
        f"one: {v['detail']}"
    ),
    # The server.
    "doctor.server_up": lambda v: f"{v['url']} is up",
    "doctor.server_up_at_connection": lambda v: f"{v['url']}, the address of the connection, is up",
    "doctor.server_up_here": lambda v: (
        f"{v['own']} is up; {v['url']}, the address of the connection, does not answer from here "
        f"({v['failure']}), as may be where only Label Studio reaches it"
    ),
    "doctor.server_down": lambda v: f"{v['url']} does not answer ({v['failure']})",
    "doctor.server_down_everywhere": lambda v: (
        f"{v['url']}, the address of the connection, does not answer ({v['failure']}), "
        f"nor does {v['own']}"
    ),
    # Label Studio.
    "doctor.label_studio_not_set": lambda v: f"{' and '.join(v['settings'])} not set",
    "doctor.label_studio_answers": lambda v: f"{v['url']} answers, version {v['version']}",
    "doctor.label_studio_fails": lambda v: str(v["detail"]),
    "doctor.token_accepted": lambda v: f"it is {v['user']}'s",
    "doctor.token_refused": lambda v: str(v["detail"]),
    "doctor.requests_fail": lambda v: (
        f"those to {v['url']} fail since {v['since']} UTC: {v['detail']}"
    ),
    # A project.
    "doctor.project": lambda v: f"{v['project']} is {v['title']!r}",
    "doctor.project_unreadable": lambda v: str(v["detail"]),
    "doctor.label_config": lambda v: "labels: " + ", ".join(v["labels"]),
    "doctor.label_config_unusable": lambda v: str(v["detail"]),
    "doctor.known_labels": lambda v: str(v["detail"]),
    "doctor.known_labels_mistaken": lambda v: str(v["detail"]),
    "doctor.not_connected": lambda v: "the project is not connected",
    "doctor.address_not_connected": lambda v: f"{v['url']} is not connected",
    "doctor.connection_lacks_credentials": lambda v: (
        f"{v['url']} was added by hand, and lacks the credentials (BASIC_AUTH_USER and _PASS)"
    ),
    "doctor.connection_unreachable": lambda v: (
        f"Label Studio does not reach {v['address']}: {v['detail']}"
    ),
    "doctor.connection_refused": lambda v: (
        f"Label Studio does not reach {v['address']}: {v['detail']}"
    ),
    "doctor.connection_title": lambda v: (
        f"its title is {v['title']!r}, the project's model version {v['model_version']!r}, ours "
        f"{v['version']!r}: the next task is chosen at random"
    ),
    "doctor.connection": lambda v: f"Label Studio reaches {v['url']}, titled {v['version']}",
    "doctor.webhook": lambda v: f"Label Studio has one to {v['address']}",
    "doctor.webhook_missing": lambda v: f"there is none to {v['address']}",
    "doctor.webhook_wrong": lambda v: (
        "it is there more than once, off, or lacks the credentials or the secret"
    ),
    "doctor.heard_from": lambda v: "a webhook arrived just now, on request",
    "doctor.not_heard_from": lambda v: (
        f"a webhook that was asked for did not arrive; last heard from: {v['last'] or 'never'}"
    ),
    "doctor.no_task": lambda v: "the project has no task yet",
    "doctor.no_image_in_task": lambda v: f"task {v['task']}: {v['detail']}",
    "doctor.image_unreadable": lambda v: f"task {v['task']}, {v['route']}: {v['detail']}",
    "doctor.image": lambda v: f"task {v['task']}: {v['width']} x {v['height']}, {v['route']}",
}

REMEDIES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "doctor.disk_low": lambda v: (
        "make room, or set MODEL_DIR to a larger disk, or a smaller ML_BACKEND_IMAGE_CACHE_BYTES"
    ),
    "doctor.weights_missing": lambda v: (
        "allow the download, or set ML_BACKEND_WEIGHTS to a file; without, trainings start from "
        "nothing and need more annotations"
    ),
    "doctor.weights_unusable": lambda v: "see ML_BACKEND_WEIGHTS",
    "doctor.version_unloadable": lambda v: (
        "restore the folder (it is tried again within a minute), or `ml-backend rollback -p "
        f"{v['project']}`"
    ),
    "doctor.server_down": lambda v: _START,
    "doctor.server_down_everywhere": lambda v: _START,
    "doctor.label_studio_not_set": lambda v: (
        "set them: the token stands in Label Studio under Account & Settings"
    ),
    "doctor.label_studio_fails": lambda v: "check LABEL_STUDIO_URL",
    "doctor.token_refused": lambda v: "check LABEL_STUDIO_API_KEY",
    "doctor.requests_fail": lambda v: (
        "what waits for it goes on by itself once it does what is asked"
    ),
    "doctor.project_unreadable": lambda v: "check the number, and whose token it is",
    "doctor.label_config_unusable": lambda v: "change it in Label Studio",
    "doctor.known_labels_mistaken": lambda v: "change predicted_values in the config",
    "doctor.not_connected": _again,
    "doctor.address_not_connected": _again,
    "doctor.connection_lacks_credentials": _again,
    "doctor.connection_unreachable": lambda v: "check the address given to `connect --url`",
    "doctor.connection_title": _again,
    "doctor.webhook_missing": _again,
    "doctor.webhook_wrong": _again,
    "doctor.not_heard_from": lambda v: str(v["remedy"]),
    "doctor.no_task": lambda v: "import images",
    "doctor.no_image_in_task": lambda v: (
        'the label config\'s value="$..." must name a field of the tasks'
    ),
}
"""What to do about a finding, by its code; a finding that needs nothing has none."""


def remedy(reason: Reason) -> str:
    """Words the remedy of a finding; empty where nothing is to be done, or its words say it."""
    make = REMEDIES.get(reason.code)
    return make(reason.values) if make is not None else ""
