"""The predict/fit interface of label-studio-ml: one class, without its server.

Constructed for every request, as label-studio-ml does, it is only a view of the backend of this
process, which is made once. `ml_backend.adapter` hosts it in label-studio-ml's own server.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from ml_backend.backend import Backend
from ml_backend.label_studio.events import (
    Ignored,
    TrainingRequested,
    parse_event,
    parse_project_key,
)
from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.settings import load_settings
from ml_backend.store.states import Trigger
from ml_backend.wording import told


@functools.cache
def shared_backend() -> Backend:
    """The backend of this process, with a worker's share of it left to `ml-backend worker`."""
    return Backend(load_settings())


class DetectorModel:
    """Pre-annotates a project's tasks and learns from its annotations.

    Args:
        project_id: the project's key, `"{id}.{creation as unix seconds}"`, as Label Studio sends
            it.
        label_config: its label config, XML.
    """

    def __init__(self, project_id: str | None = None, label_config: str | None = None) -> None:
        self.project_id = project_id or ""
        self.label_config = label_config or ""
        self.model_version = ""
        self.setup()

    def setup(self) -> None:
        """Makes the project known and reads the version that would predict; loads nothing."""
        if not self.project_id or not self.label_config:
            return
        key = parse_project_key(self.project_id)
        backend = shared_backend()
        self._project = backend.ingest.introduce(key.key, key.id, label_config=self.label_config)
        self.model_version = backend.models.version(self._project)

    def predict(
        self, tasks: Sequence[dict[str, Any]], context: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Predicts for tasks.

        Args:
            tasks: as Label Studio sends them.
            context: of interactive labelling; a detector of boxes has no use for it.
            kwargs: `login`, `password` and whatever else Label Studio passes.

        Returns:
            One prediction for each task, in order: `result`, `score`, `model_version`. One whose
            image cannot be had, or that was not done in time, has no region.
        """
        backend = shared_backend()
        predicted = backend.serving.predict(
            self._project,
            parse_label_config(self.label_config),
            tasks,
            deadline=time.monotonic() + backend.settings.predict_deadline,
        )
        nothing = {"result": [], "score": 0.0, "model_version": predicted.version}
        return [result if result is not None else dict(nothing) for result in predicted.results]

    def fit(self, event: str, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Stores a webhook's event; a training that is due starts in the worker, not here.

        Args:
            event: the action, `ANNOTATION_CREATED` for example.
            data: the webhook's body.
            kwargs: ignored.
        """
        parsed = parse_event({**data, "action": event})
        if isinstance(parsed, Ignored):
            return {"status": "ignored"}
        backend = shared_backend()
        applied = backend.ingest.apply(parsed, parsed.project)
        if isinstance(parsed, TrainingRequested):
            asked = backend.requests.training(
                applied.project_id, trigger=Trigger.BUTTON, forced=True
            )
            return {"status": asked.state, "job": asked.job, **told("reason", asked.reason)}
        return {"status": "stored", "changed": applied.changed}
