"""Test label-studio-ml's interface: the class alone, and hosted by label-studio-ml's server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_backend.adapter import label_studio_ml_model
from ml_backend.model import DetectorModel, shared_backend
from tests.conftest import capture

STAND_IN = {
    "__init__.py": "",
    # What its server relies on, after label_studio_ml 2.x, which no package index has.
    "model.py": """
class LabelStudioMLBase:
    def __init__(self, project_id=None, label_config=None):
        self.project_id = project_id or ""
        self.label_config = label_config
        self._values = {}
        self.setup()

    def setup(self):
        pass

    def get(self, key):
        return self._values.get(key)

    def set(self, key, value):
        self._values[key] = value

    @property
    def model_version(self):
        return self.get("model_version")
""",
    "response.py": """
from typing import List, Optional
from label_studio_sdk.label_interface.objects import PredictionValue
from pydantic import BaseModel


class ModelResponse(BaseModel):
    model_version: Optional[str] = None
    predictions: List[PredictionValue]
""",
}


@pytest.fixture(autouse=True)
def _own_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("ML_BACKEND_WEIGHTS", "none")
    monkeypatch.setenv("ML_BACKEND_DEVICE", "cpu")
    shared_backend.cache_clear()
    yield
    shared_backend.cache_clear()


@pytest.fixture
def _hosted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "site" / "label_studio_ml"
    package.mkdir(parents=True)
    for name, text in STAND_IN.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(package.parent))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "label_studio_ml"]:
        del sys.modules[name]


def _request() -> tuple[str, str, list[dict[str, Any]]]:
    body = capture("POST_predict")
    return body["project"], body["label_config"], body["tasks"]


def test_detector_model_predict_answers_one_prediction_for_each_task() -> None:
    project, config, tasks = _request()
    model = DetectorModel(project_id=project, label_config=config)
    assert model.model_version == "untrained"
    predictions = model.predict(tasks * 3, context=None, login=None, password=None)
    assert predictions == [{"result": [], "score": 0.0, "model_version": "untrained"}] * 3


def test_detector_model_fit_stores_events_and_asks_for_a_training() -> None:
    project, config, _ = _request()
    model = DetectorModel(project, config)
    told = capture("POST_webhook_ANNOTATION_CREATED")
    assert model.fit("ANNOTATION_CREATED", told) == {"status": "stored", "changed": 1}
    assert model.fit("ANNOTATION_CREATED", told) == {"status": "stored", "changed": 0}
    asked = model.fit("START_TRAINING", capture("POST_webhook_START_TRAINING"))
    assert asked["status"] == "refused"
    assert "at least 2 annotated tasks" in asked["reason"]
    assert asked["reason_code"] == "jobs.too_few_annotated"
    assert asked["reason_values"] == {"annotated": 1, "needed": 2}
    assert model.fit("REVIEW_CREATED", {}) == {"status": "ignored"}


def test_adapter_unused_does_not_import_label_studio_ml() -> None:
    assert "label_studio_ml" not in sys.modules
    with pytest.raises(ImportError, match="label_studio_ml"):
        label_studio_ml_model()


@pytest.mark.usefixtures("_hosted")
def test_adapter_hosted_answers_as_label_studio_mls_server_expects() -> None:
    from label_studio_ml.response import ModelResponse

    project, config, tasks = _request()
    hosted = label_studio_ml_model()
    # Its server constructs a model for every request; once positionally.
    assert hosted(project, config).get("model_version") == "untrained"
    model = hosted(project_id=project, label_config=config)
    response = model.predict(tasks * 2, context=None, login="", password="")
    assert isinstance(response, ModelResponse)
    assert response.model_version == "untrained"
    assert [p.result for p in response.predictions] == [[], []]
    told = capture("POST_webhook_ANNOTATION_CREATED")
    assert model.fit("ANNOTATION_CREATED", told)["status"] == "stored"
