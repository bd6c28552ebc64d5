"""Regions of `RectangleLabels` and of `Rectangle` with `Labels`: reading and writing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_backend.detection.types import Detections
from ml_backend.label_studio.controls.base import Control
from ml_backend.label_studio.label_config import parse_label_config
from tests.conftest import capture

LABELS = ("car", "rouge", "truck")
ONE_CONTROL = parse_label_config(
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="car"/><Label value="red" alias="rouge"/><Label value="truck"/>'
    "</RectangleLabels></View>"
).controls[0]
TWO_CONTROLS = parse_label_config(
    '<View><Image name="image" value="$image"/><Rectangle name="box" toName="image"/>'
    '<Labels name="kind" toName="image">'
    '<Label value="car"/><Label value="red" alias="rouge"/><Label value="truck"/>'
    "</Labels></View>"
).controls[0]
BOTH_KINDS = pytest.mark.parametrize(
    "control", [ONE_CONTROL, TWO_CONTROLS], ids=lambda kind: type(kind).__name__
)


def _region(
    value: dict[str, Any] | None = None, label: object = "car", **more: Any
) -> dict[str, Any]:
    """A region on an image of 200 x 100 pixels, wider than it is high."""
    return {
        "id": "r1",
        "from_name": "label",
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
        "value": {
            "x": 10,
            "y": 20,
            "width": 30,
            "height": 40,
            "rotation": 0,
            "rectanglelabels": [label],
            **(value or {}),
        },
        **more,
    }


def _found(boxes: Sequence[Sequence[float]], scores: Sequence[float]) -> Detections:
    """Detections with boxes in pixels; the class of each is irrelevant here."""
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.zeros(len(boxes), np.int64),
    )


GOOD = _region(id="good")
# Any JSON, with numbers that a prediction of another program may hold.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.sampled_from([*LABELS, "label", "image", "12"])
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rectanglelabels", "labels", "x", "id"]), inner)
    ),
    max_leaves=6,
)


@st.composite
def _pictures(draw: st.DrawFn) -> tuple[int, int, list[tuple[float, float, float, float, str]]]:
    def span() -> tuple[float, float]:
        start = draw(st.floats(0, 0.98))
        return start, draw(st.floats(start + 0.01, 1))

    boxes = []
    for _ in range(draw(st.integers(0, 6))):
        (x1, x2), (y1, y2) = span(), span()
        boxes.append((x1, y1, x2, y2, draw(st.sampled_from(LABELS))))
    return draw(st.integers(16, 12_000)), draw(st.integers(16, 12_000)), boxes


@BOTH_KINDS
@given(picture=_pictures())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_write_regions_then_read_regions_gives_the_same_boxes(
    control: Control, picture: tuple[int, int, list[tuple[float, float, float, float, str]]]
) -> None:
    width, height, boxes = picture
    fractions = np.array([box[:4] for box in boxes], np.float64).reshape(-1, 4)
    pixels = (fractions * [width, height, width, height]).tolist()
    labels = [box[4] for box in boxes]
    scores = [0.5] * len(boxes)
    result = control.write_regions(_found(pixels, scores), labels, width, height)
    read = control.read_regions(result)
    assert read.dropped == ()
    assert [box.label for box in read.regions] == labels
    back = np.array([[box.x1, box.y1, box.x2, box.y2] for box in read.regions]).reshape(-1, 4)
    assert np.abs(back - fractions).max(initial=0) < 1e-3
    assert len({box.region_id for box in read.regions}) == len(boxes)


def test_rectangle_labels_write_regions_gives_label_studios_fields() -> None:
    (region,) = ONE_CONTROL.write_regions(
        _found([[20, 10, 60, 40]], [0.75]),
        ["rouge"],
        200,
        100,
    )
    assert region.pop("id")
    value = region.pop("value")
    assert region == {
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "score": 0.75,
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
    }
    assert value.pop("rectanglelabels") == ["rouge"]
    assert value == pytest.approx({"x": 10, "y": 10, "width": 20, "height": 30, "rotation": 0})


def test_rectangle_write_regions_gives_two_results_with_one_id_and_place() -> None:
    result = TWO_CONTROLS.write_regions(
        _found([[20, 10, 60, 40], [0, 0, 200, 100]], [0.75, 0.5]),
        ["rouge", "car"],
        200,
        100,
    )
    assert [(r["from_name"], r["type"]) for r in result] == [
        ("box", "rectangle"),
        ("kind", "labels"),
    ] * 2
    for rectangle, labels in (result[:2], result[2:]):
        assert rectangle["id"] == labels["id"]
        assert "labels" not in rectangle["value"]
        assert {**rectangle["value"], "labels": labels["value"]["labels"]} == labels["value"]
    assert result[0]["id"] != result[2]["id"]
    assert [r["value"]["labels"] for r in result[1::2]] == [["rouge"], ["car"]]


@BOTH_KINDS
def test_write_regions_gives_equal_ids_for_equal_input_and_one_id_for_each_box(
    control: Control,
) -> None:
    def ids(*boxes: list[float]) -> list[str]:
        return [
            region["id"]
            for region in control.write_regions(
                _found(boxes, [0.5] * len(boxes)),
                ["car"] * len(boxes),
                200,
                100,
            )
        ]

    twice = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]
    assert ids(*twice) == ids(*twice)
    assert len(set(ids(*twice))) == 2
    assert ids([1, 2, 3, 4]) != ids([1, 2, 3, 5])


def test_write_regions_box_beyond_the_image_is_cut_off_at_its_edges() -> None:
    (region,) = ONE_CONTROL.write_regions(
        _found([[-10, -5, 220, 50]], [0.5]),
        ["car"],
        200,
        100,
    )
    value = {key: region["value"][key] for key in ("x", "y", "width", "height")}
    assert value == pytest.approx({"x": 0, "y": 0, "width": 100, "height": 50})


def test_read_regions_recorded_annotation_gives_its_box() -> None:
    body = capture("POST_webhook_ANNOTATION_CREATED")
    control = parse_label_config(body["project"]["label_config"]).controls[0]
    (box,) = control.read_regions(body["annotation"]["result"]).regions
    assert (box.label, box.region_id, box.origin) == ("RBC", "r1", None)
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((0.01, 0.02, 0.11, 0.14))


@pytest.mark.parametrize(
    ("rotation", "expected"),
    # The top left corner is at pixel (100, 20), the rectangle 40 wide and 30 high, the image
    # 200 x 100; clockwise on the screen. Pixels, worked out by hand:
    [
        (0, (100, 20, 140, 50)),
        (30, (85, 20, 134.6410, 65.9808)),
        (45, (78.7868, 20, 128.2843, 69.4975)),
        (90, (70, 20, 100, 60)),
        (360, (100, 20, 140, 50)),
        # These reach above the image and are cut off there.
        (180, (60, 0, 100, 20)),
        (270, (100, 0, 130, 20)),
        (-90, (100, 0, 130, 20)),
    ],
)
def test_read_regions_rotated_rectangle_labels_gives_the_enclosing_box(
    rotation: float, expected: tuple[float, float, float, float]
) -> None:
    region = _region({"x": 50, "y": 20, "width": 20, "height": 30, "rotation": rotation})
    (box,) = ONE_CONTROL.read_regions([region]).regions
    pixels = (box.x1 * 200, box.y1 * 100, box.x2 * 200, box.y2 * 100)
    assert pixels == pytest.approx(expected, abs=1e-3)


def test_read_regions_rotated_rectangle_with_labels_gives_the_enclosing_box() -> None:
    value = {"x": 50, "y": 20, "width": 20, "height": 30, "rotation": 90}
    size = {"original_width": 200, "original_height": 100}
    common = {"id": "r1", "to_name": "image", **size}
    result = [
        {**common, "from_name": "kind", "type": "labels", "value": {**value, "labels": ["car"]}},
        {**common, "from_name": "box", "type": "rectangle", "value": value},
    ]
    (box,) = TWO_CONTROLS.read_regions(result).regions
    assert (box.label, box.region_id) == ("car", "r1")
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((0.35, 0.2, 0.5, 0.6))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"x": -10, "y": -20, "width": 30, "height": 50}, (0, 0, 0.2, 0.3)),
        ({"x": 90, "y": 80, "width": 30, "height": 50}, (0.9, 0.8, 1, 1)),
        ({"x": -5, "y": -5, "width": 200, "height": 200}, (0, 0, 1, 1)),
    ],
)
def test_read_regions_rectangle_beyond_the_image_is_cut_off_at_its_edges(
    value: dict[str, Any], expected: tuple[float, ...]
) -> None:
    (box,) = ONE_CONTROL.read_regions([_region(value)]).regions
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (_region({"x": float("nan")}), "not finite"),
        (_region({"width": float("inf")}), "not finite"),
        (_region({"rotation": float("-inf")}), "not finite"),
        (_region({"x": "left"}), "no number"),
        (_region({"x": "12.5"}), "no number"),
        (_region({"y": [1]}), "no number"),
        (_region({"y": None}), "no number"),
        (_region({"width": True}), "no number"),
        (_region({"height": 10**400}), "no number"),
        (_region({"x": 1e308, "width": 1e308}), "too large"),
        (_region(original_width="wide"), "no number"),
        (_region(original_height=-100), "original_height"),
        (_region({"width": 0}), "no area"),
        (_region({"height": 0}), "no area"),
        (_region({"x": 120}), "no area"),
        (_region({"y": -60}), "no area"),
        (_region(label="zebra"), "zebra"),
        # In results the alias stands, never the value.
        (_region(label="red"), "red"),
        (_region(label=7), "7"),
        (_region(label=["car"]), "not in the config"),
        (_region({"rectanglelabels": []}), "(none)"),
        (_region({"rectanglelabels": None}), "(none)"),
        (_region({"rectanglelabels": 5}), "(none)"),
        (_region({"rectanglelabels": "car"}), "(none)"),
        ({**_region(), "value": None}, "no value"),
        ({**_region(), "value": [1, 2]}, "no value"),
    ],
)
def test_read_regions_invalid_region_is_dropped_with_a_reason_and_others_are_kept(
    bad: dict[str, Any], reason: str
) -> None:
    read = ONE_CONTROL.read_regions([GOOD, bad, {**GOOD, "id": "good too"}])
    assert [box.region_id for box in read.regions] == ["good", "good too"]
    (sentence,) = read.dropped
    assert reason in sentence


@pytest.mark.parametrize("name", ["x", "y", "width", "height"])
def test_read_regions_missing_coordinate_drops_the_region(name: str) -> None:
    bad = _region()
    del bad["value"][name]
    read = ONE_CONTROL.read_regions([bad, GOOD])
    assert [box.region_id for box in read.regions] == ["good"]
    assert len(read.dropped) == 1


def test_read_regions_missing_rotation_counts_as_none() -> None:
    region = _region()
    del region["value"]["rotation"]
    (box,) = ONE_CONTROL.read_regions([region]).regions
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((0.1, 0.2, 0.4, 0.6))


def test_read_regions_rectangle_without_a_labels_result_is_dropped() -> None:
    result = TWO_CONTROLS.write_regions(
        _found([[20, 10, 60, 40], [0, 0, 200, 100]], [0.75, 0.5]),
        ["rouge", "car"],
        200,
        100,
    )
    read = TWO_CONTROLS.read_regions([result[0], *result[2:]])
    assert [box.label for box in read.regions] == ["car"]
    assert len(read.dropped) == 1


def test_read_regions_several_labels_uses_the_first_of_the_label_config() -> None:
    region = _region({"rectanglelabels": ["zebra", "truck", "car"]})
    (box,) = ONE_CONTROL.read_regions([region]).regions
    assert box.label == "truck"


def test_read_regions_regions_of_other_controls_and_images_are_ignored() -> None:
    others = [
        _region(from_name="polygons"),
        _region(to_name="other image"),
        {"from_name": "quality", "to_name": "image", "value": {"choices": ["good"]}},
        "not a region",
        None,
    ]
    read = ONE_CONTROL.read_regions([*others, GOOD])
    assert [box.region_id for box in read.regions] == ["good"]
    assert read.dropped == ()


@pytest.mark.parametrize("origin", ["prediction", "prediction-changed", "manual"])
def test_read_regions_keeps_the_origin(origin: str) -> None:
    (box,) = ONE_CONTROL.read_regions([_region(origin=origin)]).regions
    assert box.origin == origin


@BOTH_KINDS
@given(data=st.data())
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_read_regions_any_json_gives_boxes_inside_the_image_or_a_reason(
    control: Control, data: st.DataObject
) -> None:
    def maybe(usual: object) -> Any:
        return data.draw(JSON) if data.draw(st.integers(0, 3)) == 0 else usual

    value = {
        key: maybe(usual)
        for key, usual in (("x", 1), ("y", 2), ("width", 30), ("height", 40), ("rotation", 10))
    }
    common = {
        "id": maybe("r1"),
        "to_name": "image",
        "original_width": maybe(200),
        "original_height": maybe(100),
        "origin": maybe("manual"),
    }
    names = maybe(["car"])
    result = [
        {**common, "from_name": "label", "value": maybe({**value, "rectanglelabels": names})},
        {**common, "from_name": "box", "value": maybe(value)},
        {**common, "from_name": "kind", "value": maybe({**value, "labels": names})},
        data.draw(JSON),
    ]
    read = control.read_regions(result)
    assert len(read.regions) + len(read.dropped) == 1
    for box in read.regions:
        assert box.label in LABELS
        assert 0 <= box.x1 < box.x2 <= 1
        assert 0 <= box.y1 < box.y2 <= 1
