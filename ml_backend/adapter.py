"""Hosts the detector in label-studio-ml's own server (2.x, from its repository).

    from label_studio_ml.api import init_app
    from ml_backend.adapter import label_studio_ml_model

    app = init_app(model_class=label_studio_ml_model())

label-studio-ml is imported only here, and only when this is called: it is not a dependency.
"""

from __future__ import annotations

from typing import Any

from ml_backend.model import DetectorModel


def label_studio_ml_model() -> type[Any]:
    """The `LabelStudioMLBase` subclass that answers with this backend's predictions.

    Raises:
        ImportError: label-studio-ml 2.x is not installed.
    """
    from label_studio_ml.model import LabelStudioMLBase
    from label_studio_ml.response import ModelResponse
    from label_studio_sdk.label_interface.objects import PredictionValue

    class HostedDetector(LabelStudioMLBase):  # type: ignore[misc]
        """A view of the detector for one request."""

        def setup(self) -> None:
            self._detector = DetectorModel(self.project_id, self.label_config)
            self.set("model_version", self._detector.model_version or "untrained")

        def predict(
            self, tasks: list[dict[str, Any]], context: dict[str, Any] | None = None, **kwargs: Any
        ) -> Any:
            predictions = self._detector.predict(tasks, context=context, **kwargs)
            return ModelResponse(
                predictions=[PredictionValue(**p) for p in predictions],
                model_version=self._detector.model_version,
            )

        def fit(self, event: str, data: dict[str, Any], **kwargs: Any) -> Any:
            return self._detector.fit(event, data, **kwargs)

    return HostedDetector
