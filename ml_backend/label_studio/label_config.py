"""A project's label config: which controls draw boxes, on which images, with which labels."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from label_studio_sdk.label_interface.control_tags import ControlTag
from label_studio_sdk.label_interface.interface import LabelInterface
from label_studio_sdk.label_interface.object_tags import ObjectTag

LARGEST = 1_000_000
"""Characters of a label config: one with 20,000 labels has half as many."""


class LabelConfigError(ValueError):
    """A label config cannot be used; the text says why, for the admin who wrote it."""


class InvalidLabelConfig(LabelConfigError):
    """It is no valid label config."""


class NothingToDetect(LabelConfigError):
    """It has no control that draws boxes on an image."""


@dataclass(frozen=True, slots=True)
class Label:
    """A label of a control.

    Attributes:
        value: its name in the config.
        alias: what stands in results instead, where given.
        predicted_values: names of a pretrained detector's classes that mean it.
    """

    value: str
    alias: str | None = None
    predicted_values: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """The name in results."""
        return self.alias or self.value


@dataclass(frozen=True, slots=True)
class BoxControl:
    """A control that draws boxes on an image.

    Attributes:
        kind: `RectangleLabels`, or `Rectangle` with a `Labels` on the same image.
        from_name: the control's name in results.
        labels_from_name: the name of the `Labels`, for the second kind; `from_name` otherwise.
        to_name: the image's name.
        data_key: the field of a task's data that holds the image.
        labels: its labels, in the config's order.
        score_threshold: `model_score_threshold`, where given.
    """

    kind: Literal["rectanglelabels", "rectangle+labels"]
    from_name: str
    labels_from_name: str
    to_name: str
    data_key: str
    labels: tuple[Label, ...]
    score_threshold: float | None = None


@dataclass(frozen=True)
class LabelConfig:
    """What a detector needs to know of a label config."""

    controls: tuple[BoxControl, ...]

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of all labels as they stand in results, each once, in the config's order."""
        return tuple(dict.fromkeys(label.output for c in self.controls for label in c.labels))

    def controls_by_image(self) -> dict[str, tuple[BoxControl, ...]]:
        """The controls of each image, by the field of a task's data that holds it."""
        keys = dict.fromkeys(control.data_key for control in self.controls)
        return {key: tuple(c for c in self.controls if c.data_key == key) for key in keys}


@dataclass(frozen=True, slots=True)
class LabelMatch:
    """Which labels a pretrained detector knows.

    Attributes:
        matched: the detector's classes, by label.
        unmatched: labels that it does not know.
        mistaken: names in `predicted_values` that are no classes of its.
        suggestions: a class of a similar name, by unmatched label or mistaken name.
    """

    matched: dict[str, tuple[str, ...]]
    unmatched: tuple[str, ...]
    mistaken: tuple[str, ...]
    suggestions: dict[str, str]

    def in_words(self, weights: str) -> str:
        """The same in one line; `weights` are called so."""
        parts = [f"{weights} know {', '.join(self.matched) or 'none of the labels'}"]
        if self.unmatched:
            parts.append(f"they do not know {', '.join(self.unmatched)}")
        if self.mistaken:
            parts.append(f"predicted_values names no class of theirs: {', '.join(self.mistaken)}")
        parts += [f"{name}: did you mean {close}?" for name, close in self.suggestions.items()]
        return "; ".join(parts)


@functools.lru_cache(maxsize=256)
def parse_label_config(xml: str) -> LabelConfig:
    """Reads a label config.

    Raises:
        InvalidLabelConfig: it is not valid, or declares entities.
        NothingToDetect: it draws no boxes on an image.
    """
    root = _checked(xml)
    if "".join(root.itertext()).strip() and not len(root):
        raise InvalidLabelConfig("the label config holds text and no tag")
    try:
        interface = LabelInterface(xml)
        objects = {o.name: o for o in interface.objects if o.tag == "Image"}
        controls = [*interface.controls]
    except Exception as error:
        # The parser's errors are of many kinds; each means that the config is not valid.
        raise InvalidLabelConfig(f"the label config is not valid: {error}") from error
    found: list[BoxControl] = []
    # Of several on an image the first counts.
    labels_of = {
        image: control
        for control in reversed(controls)
        if control.tag == "Labels" and control.name and _labels(control)
        for image in control.to_name or ()
    }
    for control in controls:
        for image in (objects[name] for name in control.to_name or () if name in objects):
            box = _box_control(control, labels_of, image)
            if box is not None:
                found.append(box)
    if not found:
        raise NothingToDetect(
            "there is nothing to detect in this label config: it needs <RectangleLabels> with at "
            "least one <Label>, or <Rectangle> and <Labels>, whose toName is an <Image "
            'value="$...">'
        )
    return LabelConfig(tuple(found))


def match_labels(config: LabelConfig, known: Sequence[str]) -> LabelMatch:
    """Finds the labels that a pretrained detector knows: by `predicted_values`, or by name.

    Args:
        config: the label config.
        known: the detector's classes.
    """
    by_name = {name.casefold(): name for name in known}
    matched: dict[str, tuple[str, ...]] = {}
    for control in config.controls:
        for label in control.labels:
            names = label.predicted_values or (label.value, label.output)
            classes = _known(names, by_name)
            if classes:
                matched[label.output] = classes
    unmatched = tuple(label for label in config.labels if label not in matched)
    asked = [n for c in config.controls for label in c.labels for n in label.predicted_values]
    mistaken = tuple(dict.fromkeys(n for n in asked if n.casefold() not in by_name))
    suggestions = {}
    for name in (*unmatched, *mistaken):
        close = difflib.get_close_matches(name.casefold(), by_name, 1)
        if close:
            suggestions[name] = by_name[close[0]]
    return LabelMatch(matched, unmatched, mistaken, suggestions)


def _known(names: Iterable[str], by_name: dict[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(by_name[n.casefold()] for n in names if n.casefold() in by_name))


def _checked(xml: str) -> Element:
    if not xml.strip():
        raise InvalidLabelConfig("the label config is empty: write one in the project's settings")
    if len(xml) > LARGEST:
        raise InvalidLabelConfig(f"the label config has more than {LARGEST:,} characters")
    try:
        root: Element = fromstring(xml, forbid_dtd=True)
    except DefusedXmlException:
        raise InvalidLabelConfig(
            "the label config declares a document type or entities, which is not allowed"
        ) from None
    except (ParseError, ValueError) as error:
        raise InvalidLabelConfig(f"the label config is not valid XML: {error}") from None
    return root


def _box_control(
    control: ControlTag, labels_of: Mapping[str, ControlTag], image: ObjectTag
) -> BoxControl | None:
    # Without the dollar sign it is an address of its own, not a field of the task's data.
    key = image.value_name if (image.value or "").startswith("$") else None
    if not key or not control.name or not image.name:
        return None
    if control.tag == "RectangleLabels":
        labels = _labels(control)
        if not labels:
            return None
        return BoxControl(
            "rectanglelabels",
            control.name,
            control.name,
            image.name,
            key,
            labels,
            _threshold(control),
        )
    other = labels_of.get(image.name)
    if control.tag == "Rectangle" and other is not None and other.name:
        return BoxControl(
            "rectangle+labels",
            control.name,
            other.name,
            image.name,
            key,
            _labels(other),
            _threshold(control, other),
        )
    return None


def _labels(control: ControlTag) -> tuple[Label, ...]:
    result = []
    for tag in (control.labels_attrs or {}).values():
        attributes = tag.attr or {}
        name = attributes.get("value") or attributes.get("alias")
        if not name:
            continue
        values = attributes.get("predicted_values", "").split(",")
        result.append(
            Label(
                name,
                attributes.get("alias") or None,
                tuple(value.strip() for value in values if value.strip()),
            )
        )
    return tuple(result)


def _threshold(*controls: ControlTag) -> float | None:
    for control in controls:
        text = (control.attr or {}).get("model_score_threshold")
        if text is None:
            continue
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise InvalidLabelConfig(
                f'model_score_threshold="{text}" of {control.name} must be a number from 0 to 1'
            )
        return value
    return None
