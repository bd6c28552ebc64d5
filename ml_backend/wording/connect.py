"""Words the steps of connecting a project."""

from __future__ import annotations

WORDS = {
    "connect.double_connection": lambda v: f"removed the double connection {v['connection']}",
    "connect.connected": lambda v: f"connected {v['url']} as {v['version']}",
    "connect.was_connected": lambda v: f"the connection was there; its title is {v['version']}",
    "connect.webhook_created": lambda v: "created the webhook",
    "connect.double_webhook": lambda v: f"removed the double webhook {v['webhook']}",
    "connect.webhook_repaired": lambda v: "put the webhook right",
    "connect.webhook_right": lambda v: "the webhook is right",
    "connect.project_set": lambda v: "turned on uncertainty sampling and pre-annotation",
    "connect.read_back": lambda v: (
        f"read back from Label Studio: {v['annotated']} annotated "
        f"{'task' if v['annotated'] == 1 else 'tasks'}"
    ),
}
