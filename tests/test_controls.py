"""The registry of controls: a control of another package, and controls without a label config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml_backend.detection.types import Detections
from ml_backend.extensions import CONTROLS
from ml_backend.label_studio.controls.base import Label
from ml_backend.label_studio.controls.rectangle import Rectangle
from ml_backend.label_studio.controls.rectangle_labels import RectangleLabels
from ml_backend.label_studio.label_config import (
    InvalidLabelConfig,
    NothingToDetect,
    parse_label_config,
)
from tests.extension import install_extension

POINTS = (
    '<View><Image name="photo" value="$picture"/><KeyPointLabels name="tip" toName="photo">'
    '<Label value="nose"/></KeyPointLabels></View>'
)


def test_control_of_an_entry_point_is_parsed_and_reads_and_writes_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NothingToDetect):
        parse_label_config(POINTS)
    install_extension(
        CONTROLS, "keypoints", "tests.key_point_labels:KeyPointLabels", tmp_path, monkeypatch
    )
    parse_label_config.cache_clear()
    config = parse_label_config(POINTS)
    (control,) = config.controls
    assert config.labels == ("nose",)
    assert (control.to_name, control.data_key) == ("photo", "picture")
    found = Detections(
        np.array([[20, 10, 40, 30]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64)
    )
    written = control.write_regions(found, ["nose"], 200, 100)
    assert (written[0]["value"]["x"], written[0]["value"]["y"]) == pytest.approx((15, 20))
    (region,) = control.read_regions(written).regions
    assert (region.x1, region.y1, region.x2, region.y2) == pytest.approx(
        (0.145, 0.195, 0.155, 0.205)
    )


def test_control_of_an_entry_point_is_named_where_a_config_has_no_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_extension(
        CONTROLS, "keypoints", "tests.key_point_labels:KeyPointLabels", tmp_path, monkeypatch
    )
    with pytest.raises(NothingToDetect, match="or <Rectangle> and <Labels>, or <KeyPointLabels>"):
        parse_label_config('<View><Image name="nothing" value="$to_mark"/></View>')


def test_control_that_raises_a_value_error_makes_the_config_invalid() -> None:
    with pytest.raises(InvalidLabelConfig, match='model_score_threshold="high" of box must be'):
        parse_label_config(
            '<View><Image name="a" value="$a"/><Rectangle name="box" toName="a" '
            'model_score_threshold="high"/><Labels name="kind" toName="a"><Label value="x"/>'
            "</Labels></View>"
        )


def test_infer_gives_the_controls_that_drew_the_regions_of_results() -> None:
    def region(number: str, from_name: str, kind: str, **value: object) -> dict[str, Any]:
        return {
            "id": number,
            "from_name": from_name,
            "to_name": "image",
            "type": kind,
            "value": value,
        }

    results: list[list[Any]] = [
        [
            region("1", "label", "rectanglelabels", rectanglelabels=["car"]),
            region("2", "box", "rectangle", x=1),
            region("2", "kind", "labels", labels=["bus"]),
            region("3", "shape", "polygonlabels", polygonlabels=["tree"]),
        ],
        [region("1", "label", "rectanglelabels", rectanglelabels=["truck", 7]), None, {"id": 4}],
    ]
    assert RectangleLabels.infer(results) == [
        RectangleLabels("label", "image", "image", (Label("car"), Label("truck")))
    ]
    assert Rectangle.infer(results) == [
        Rectangle("box", "image", "image", (Label("bus"),), labels_from_name="kind")
    ]
