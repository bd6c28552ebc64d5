"""Label configs: their controls, labels and thresholds, and the errors of invalid ones."""

from __future__ import annotations

import pytest

from ml_backend.label_studio.controls.base import Label
from ml_backend.label_studio.controls.rectangle import Rectangle
from ml_backend.label_studio.controls.rectangle_labels import RectangleLabels
from ml_backend.label_studio.label_config import (
    InvalidLabelConfig,
    LabelConfigError,
    NothingToDetect,
    match_labels,
    parse_label_config,
)
from tests.conftest import capture

IMAGE = '<Image name="image" value="$image"/>'


def _rectangle_labels(labels: str, attributes: str = "") -> str:
    return (
        f'<View>{IMAGE}<RectangleLabels name="label" toName="image" {attributes}>'
        f"{labels}</RectangleLabels></View>"
    )


def test_parse_recorded_setup_gives_its_control() -> None:
    config = parse_label_config(capture("POST_setup")["schema"])
    assert config.controls == (
        RectangleLabels(
            from_name="label",
            to_name="image",
            data_key="image",
            labels=(Label("RBC"), Label("WBC"), Label("Platelets")),
        ),
    )
    assert config.labels == ("RBC", "WBC", "Platelets")


def test_parse_rectangle_takes_the_labels_of_the_labels_tag_on_its_image() -> None:
    config = parse_label_config(
        '<View><Image name="photo" value="$picture"/><Image name="other" value="$second"/>'
        '<Labels name="elsewhere" toName="other"><Label value="wrong"/></Labels>'
        '<Rectangle name="box" toName="photo"/>'
        '<Labels name="kind" toName="photo"><Label value="car"/><Label value="bus"/></Labels>'
        "</View>"
    )
    assert config.controls == (
        Rectangle(
            from_name="box",
            labels_from_name="kind",
            to_name="photo",
            data_key="picture",
            labels=(Label("car"), Label("bus")),
        ),
    )


def test_parse_several_controls_and_images_groups_controls_by_data_field() -> None:
    config = parse_label_config(
        '<View><Image name="left" value="$left_image"/><Image name="right" value="$right_image"/>'
        '<RectangleLabels name="cars" toName="left"><Label value="car"/></RectangleLabels>'
        '<RectangleLabels name="people" toName="left"><Label value="person"/><Label value="car"/>'
        "</RectangleLabels>"
        '<Choices name="quality" toName="right"><Choice value="good"/></Choices>'
        '<Rectangle name="box" toName="right"/>'
        '<Labels name="kind" toName="right"><Label value="sign"/></Labels></View>'
    )
    by_image = config.controls_by_image()
    assert list(by_image) == ["left_image", "right_image"]
    assert [control.from_name for control in by_image["left_image"]] == ["cars", "people"]
    assert [control.from_name for control in by_image["right_image"]] == ["box"]
    assert config.labels == ("car", "person", "sign")


def test_parse_control_with_two_images_gives_a_control_for_each() -> None:
    config = parse_label_config(
        '<View><Image name="a" value="$first"/><Image name="b" value="$second"/>'
        '<RectangleLabels name="label" toName="a,b"><Label value="car"/></RectangleLabels></View>'
    )
    assert [(c.to_name, c.data_key) for c in config.controls] == [("a", "first"), ("b", "second")]


def test_parse_other_tags_and_comments_are_ignored() -> None:
    config = parse_label_config(
        f'<View><Header value="Find the cells"/><View style="display:flex">{IMAGE}</View>'
        '<!-- cells --><RectangleLabels name="label" toName="image"><!-- red --><View>'
        '<Label value="RBC" background="#f00"/></View></RectangleLabels></View>'
    )
    assert config.labels == ("RBC",)


def test_parse_label_with_an_alias_is_named_by_it_in_results() -> None:
    config = parse_label_config(
        _rectangle_labels('<Label value="Red blood cell" alias="rbc"/><Label value="WBC"/>')
    )
    (control,) = config.controls
    assert control.labels == (Label("Red blood cell", "rbc"), Label("WBC"))
    assert config.labels == ("rbc", "WBC")


def test_parse_label_without_a_value_is_named_by_its_alias() -> None:
    assert parse_label_config(_rectangle_labels('<Label alias="rbc"/>')).labels == ("rbc",)


def test_parse_label_without_value_and_alias_is_left_out() -> None:
    config = parse_label_config(_rectangle_labels('<Label/><Label value=""/><Label value="RBC"/>'))
    assert config.labels == ("RBC",)


def test_parse_predicted_values_are_split_at_commas_and_trimmed() -> None:
    config = parse_label_config(
        _rectangle_labels('<Label value="vehicle" predicted_values=" car, truck ,,fire hydrant"/>')
    )
    assert config.controls[0].labels[0].predicted_values == ("car", "truck", "fire hydrant")


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0.0), ("0.35", 0.35), ("1", 1.0), ("1e-2", 0.01)]
)
def test_parse_score_threshold_is_read(text: str, value: float) -> None:
    config = parse_label_config(
        _rectangle_labels('<Label value="a"/>', f'model_score_threshold="{text}"')
    )
    assert config.controls[0].score_threshold == value


def test_parse_missing_score_threshold_gives_none() -> None:
    config = parse_label_config(_rectangle_labels('<Label value="a"/>'))
    assert config.controls[0].score_threshold is None


@pytest.mark.parametrize(
    ("on_rectangle", "on_labels", "expected"),
    [
        ('model_score_threshold="0.2"', "", 0.2),
        ("", 'model_score_threshold="0.4"', 0.4),
        ('model_score_threshold="0.2"', 'model_score_threshold="0.4"', 0.2),
    ],
)
def test_parse_rectangle_threshold_on_either_tag_its_own_has_priority(
    on_rectangle: str, on_labels: str, expected: float
) -> None:
    config = parse_label_config(
        f'<View>{IMAGE}<Rectangle name="box" toName="image" {on_rectangle}/>'
        f'<Labels name="kind" toName="image" {on_labels}><Label value="a"/></Labels></View>'
    )
    assert config.controls[0].score_threshold == expected


@pytest.mark.parametrize("text", ["-0.1", "1.01", "50", "50%", "high", "", "nan", "inf", "0,5"])
def test_parse_invalid_score_threshold_error_names_it_and_its_control(text: str) -> None:
    with pytest.raises(InvalidLabelConfig) as caught:
        parse_label_config(
            _rectangle_labels('<Label value="a"/>', f'model_score_threshold="{text}"')
        )
    for part in ("model_score_threshold", f'"{text}"', "label", "from 0 to 1"):
        assert part in str(caught.value)


def test_match_labels_by_value_alias_and_predicted_values() -> None:
    config = parse_label_config(
        _rectangle_labels(
            '<Label value="CAR"/>'
            '<Label value="Fußgänger" alias="person"/>'
            '<Label value="Vehicle" predicted_values="bus,truck,no such class"/>'
            '<Label value="dog" predicted_values="cat"/>'
        )
    )
    match = match_labels(config, ["person", "Car", "bus", "truck", "cat", "dog"])
    assert match.matched == {
        "CAR": ("Car",),
        "person": ("person",),
        "Vehicle": ("bus", "truck"),
        "dog": ("cat",),
    }
    assert match.unmatched == ()
    assert match.suggestions == {}


def test_match_labels_unknown_label_is_listed_with_a_similar_class() -> None:
    config = parse_label_config(
        _rectangle_labels(
            '<Label value="car"/><Label value="Motorcicle"/><Label value="Platelets"/>'
            '<Label value="wheel" predicted_values="wheels"/>'
        )
    )
    match = match_labels(config, ["car", "Motorcycle", "person"])
    assert match.matched == {"car": ("car",)}
    assert match.unmatched == ("Motorcicle", "Platelets", "wheel")
    assert match.mistaken == ("wheels",)
    assert match.suggestions == {"Motorcicle": "Motorcycle"}


def test_match_labels_unknown_predicted_value_is_listed_beside_known_ones() -> None:
    config = parse_label_config(
        _rectangle_labels('<Label value="Vehicle" predicted_values="car,trukc"/>')
    )
    match = match_labels(config, ["car", "truck"])
    assert match.matched == {"Vehicle": ("car",)}
    assert match.mistaken == ("trukc",)
    assert match.in_words("the weights") == (
        "the weights know Vehicle; predicted_values names no class of theirs: trukc; "
        "trukc: did you mean truck?"
    )


@pytest.mark.parametrize(
    "xml",
    [
        "<View/>",
        f"<View>{IMAGE}</View>",
        f'<View>{IMAGE}<Choices name="c" toName="image"><Choice value="x"/></Choices></View>',
        f'<View>{IMAGE}<PolygonLabels name="p" toName="image"><Label value="x"/></PolygonLabels>'
        "</View>",
        _rectangle_labels(""),
        _rectangle_labels('<Label value=""/>'),
        f'<View>{IMAGE}<Rectangle name="box" toName="image"/></View>',
        f'<View>{IMAGE}<Rectangle name="box" toName="image"/>'
        '<Labels name="kind" toName="image"/></View>',
        f'<View>{IMAGE}<Labels name="kind" toName="image"><Label value="x"/></Labels></View>',
        f'<View>{IMAGE}<RectangleLabels name="label" toName="nowhere"><Label value="x"/>'
        "</RectangleLabels></View>",
        '<View><Text name="text" value="$text"/><RectangleLabels name="label" toName="text">'
        '<Label value="x"/></RectangleLabels></View>',
        '<View><Image name="image" value="image"/><RectangleLabels name="label" toName="image">'
        '<Label value="x"/></RectangleLabels></View>',
    ],
    ids=[
        "nothing",
        "an image alone",
        "choices only",
        "polygons only",
        "no label",
        "a label without a name",
        "a rectangle without labels",
        "a rectangle with empty labels",
        "labels without a rectangle",
        "toName of nothing",
        "toName of a text",
        "an image that is no field",
    ],
)
def test_parse_config_without_a_usable_control_error_lists_the_tags_needed(xml: str) -> None:
    with pytest.raises(NothingToDetect) as caught:
        parse_label_config(xml)
    for part in ("<RectangleLabels>", "<Label>", "<Rectangle>", "<Labels>", "toName", "<Image"):
        assert part in str(caught.value)


@pytest.mark.parametrize("xml", ["", "  \n\t"])
def test_parse_empty_config_error_says_empty(xml: str) -> None:
    with pytest.raises(InvalidLabelConfig, match="empty"):
        parse_label_config(xml)


@pytest.mark.parametrize(
    "xml",
    [
        "hello",
        "<View>",
        "<View></Vieww>",
        "<View/><View/>",
        '<View name="a" name="b"/>',
        "<View>&nope;</View>",
        "<View>\x00</View>",
        "<View>\ud800</View>",
        '{"label": "config"}',
    ],
)
def test_parse_invalid_xml_error_says_invalid(xml: str) -> None:
    with pytest.raises(InvalidLabelConfig, match="not valid XML"):
        parse_label_config(xml)


def test_parse_very_deep_nesting_is_an_error() -> None:
    with pytest.raises(LabelConfigError):
        parse_label_config("<View>" * 3000 + "</View>" * 3000)


def _bomb() -> str:
    entities = '<!ENTITY e0 "boom">' + "".join(
        f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12)
    )
    return f"<!DOCTYPE View [{entities}]><View>&e11;</View>"


@pytest.mark.parametrize(
    "xml",
    [
        _bomb(),
        "<!DOCTYPE View><View/>",
        '<!DOCTYPE View SYSTEM "http://127.0.0.1:9/config.dtd"><View/>',
        '<!DOCTYPE View [<!ENTITY file SYSTEM "file:///etc/hostname">]>'
        + _rectangle_labels('<Label value="x"/>&file;'),
        '<!DOCTYPE View [<!ENTITY % outside SYSTEM "http://127.0.0.1:9/e.dtd"> %outside;]><View/>',
    ],
    ids=["bomb", "document type", "external document type", "file", "parameter entity"],
)
def test_parse_document_type_or_entities_are_an_error(xml: str) -> None:
    with pytest.raises(InvalidLabelConfig, match="document type or entities"):
        parse_label_config(xml)
