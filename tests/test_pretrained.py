"""Predict before the first training, with the labels that COCO's weights know."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models import WeightsEnum

from ml_backend.backend import Backend
from ml_backend.detection.presets.small import PRESET
from ml_backend.http.app import create_app
from ml_backend.settings import load_settings
from tests.conftest import wait_for

CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image">
<Label value="Vehicle" predicted_values="car,truck"/><Label value="Person"/><Label value="Valve"/>
<Label value="Lorry" predicted_values="trukc"/>
</RectangleLabels></View>"""
KNOWN = PRESET.architecture.published_labels or ()


@pytest.fixture
def _coco_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the download, which needs a network, by a detector that finds a truck everywhere."""
    torch.manual_seed(0)
    state = PRESET.architecture.build(len(KNOWN)).state_dict()
    state["roi_heads.box_predictor.cls_score.bias"][KNOWN.index("truck") + 1] = 12.0

    def get_state_dict(self: WeightsEnum, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(state)

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    yield


@pytest.mark.usefixtures("_coco_weights")
def test_predict_before_first_training_labels_of_coco_are_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {
        "MODEL_DIR": str(tmp_path),
        "ML_BACKEND_DEVICE": "cpu",
        "ML_BACKEND_PRESET": "small",
        "ML_BACKEND_WEIGHTS": "auto",
    }
    backend = Backend(load_settings(settings))
    client = create_app(backend).test_client()
    project = {"project": "1.1795463889", "schema": CONFIG}
    wait_for(
        lambda: (
            client.post("/setup", json=project).get_json() == {"model_version": "untrained-coco"}
        ),
        within=60,
        what="the weights are loaded",
    )
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120), "grey").save(buffer, "PNG")
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    body = {
        "tasks": [{"id": 1, "data": {"image": image}}],
        "project": project["project"],
        "label_config": CONFIG,
    }
    caplog.set_level("INFO")
    for _ in range(2):
        (prediction,) = client.post("/predict", json=body).get_json()["results"]
    # What they do not know is said once, and not with every task that is opened.
    told = [m for m in caplog.messages if "COCO's weights know" in m]
    assert told == [
        "project 1.1795463889, before its first training: COCO's weights know Vehicle, Person; "
        "they do not know Valve, Lorry; predicted_values names no class of theirs: trukc; "
        "Valve: did you mean vase?; trukc: did you mean truck?"
    ]
    assert prediction["model_version"] == "untrained-coco"
    labels = {r["value"]["rectanglelabels"][0] for r in prediction["result"]}
    assert labels == {"Vehicle"}
    backend.models.close()
