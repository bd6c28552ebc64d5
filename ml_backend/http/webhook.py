"""`POST /webhook`: stores an event of Label Studio, then acknowledges it.

The annotator waits for the answer: everything else is left to the worker.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint

from ml_backend.http.request import backend, read_json
from ml_backend.label_studio.events import Ignored, TrainingRequested, parse_event
from ml_backend.serving.counters import WEBHOOKS
from ml_backend.store.states import Trigger
from ml_backend.wording import told

blueprint = Blueprint("webhook", __name__)


@blueprint.post("/webhook")
def webhook() -> dict[str, Any]:
    """Stores an event; answers how many annotations changed, or the training that it asks for."""
    body = read_json()
    event = parse_event(body)
    # Only known actions become labels, which bounds the number of counters.
    WEBHOOKS.labels("ignored" if isinstance(event, Ignored) else body["action"]).inc()
    if isinstance(event, Ignored):
        return {"status": "ignored", "action": event.action}
    applied = backend().ingest.apply(event, event.project)
    if isinstance(event, TrainingRequested):
        asked = backend().requests.training(applied.project_id, trigger=Trigger.BUTTON, forced=True)
        return {"status": asked.state, "job": asked.job, **told("reason", asked.reason)}
    return {"status": "stored", "changed": applied.changed}
