"""The contract of a control, and the values that all controls share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from label_studio_sdk.label_interface.control_tags import ControlTag

from ml_backend.detection.types import Detections


@dataclass(frozen=True, slots=True)
class Label:
    """A label of a control.

    Attributes:
        value: its name in the label config.
        alias: the name that results carry instead, if the label config gives one.
        predicted_values: names of a pretrained detector's classes that mean this label.
    """

    value: str
    alias: str | None = None
    predicted_values: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """The name in results."""
        return self.alias or self.value


@dataclass(frozen=True, slots=True)
class Media:
    """An object tag of the label config that shows a field of the task's data.

    Attributes:
        tag: the tag, for example `Image`.
        name: its name in the label config; `to_name` in results.
        data_key: the field of the task's data that it shows.
    """

    tag: str
    name: str
    data_key: str


@dataclass(frozen=True, slots=True)
class Region:
    """An object that a person marked in an image.

    Coordinates are fractions, in `[0, 1]`, of the image as a browser displays it (EXIF orientation
    applied). The box encloses the outline or mask where the region has one.

    Attributes:
        label: name of its label in results.
        x1: left edge of its box, as a fraction of the image's width.
        y1: top edge, as a fraction of the image's height.
        x2: right edge.
        y2: bottom edge.
        region_id: the region's id in Label Studio.
        origin: `prediction`, `prediction-changed` or `manual`, if Label Studio gives one.
        outline: corners `(x, y)` of a polygon, as fractions; None for other shapes.
        mask: a mask in Label Studio's run-length encoding; None for other shapes.
        track_id: identity of the object over the frames of a video; None for a still image.
    """

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    region_id: str
    origin: str | None
    outline: tuple[tuple[float, float], ...] | None = None
    mask: tuple[int, ...] | None = None
    track_id: str | None = None


@dataclass(frozen=True, slots=True)
class ReadRegions:
    """The regions of one control in the result of an annotation or a prediction.

    Attributes:
        regions: the regions that can be used.
        dropped: for each region that was left out, the reason as a sentence.
    """

    regions: tuple[Region, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Control(ABC):
    """A control of a label config on one object tag.

    To add a kind, subclass it, fill in the class variables and the abstract methods, and register
    the class in `ml_backend.extensions.CONTROLS`.

    Attributes:
        from_name: the control's name in results.
        to_name: name of the object tag that it marks.
        data_key: field of the task's data that the object tag shows.
        labels: its labels, in the order of the label config.
        score_threshold: its `model_score_threshold`, if given: a confidence in `[0, 1]`.
    """

    media_tag: ClassVar[str]
    """Object tag that the kind marks: `Image`."""
    needs: ClassVar[str]
    """The tags that the kind consists of, as an error message lists them."""
    result_types: ClassVar[frozenset[str]]
    """Values of `type` in the results that the kind draws."""

    from_name: str
    to_name: str
    data_key: str
    labels: tuple[Label, ...]
    score_threshold: float | None = None

    @classmethod
    @abstractmethod
    def parse(cls, tag: ControlTag, media: Media, tags: Sequence[ControlTag]) -> Self | None:
        """Reads a control from a label config.

        Args:
            tag: a control tag that has a name.
            media: an object tag that it marks; its tag is `media_tag`.
            tags: all control tags of the label config, in its order: labels may be in another one.

        Returns:
            The control; None if the tag is not of this kind, or has no labels.

        Raises:
            ValueError: an attribute is wrong; the text names it and its control.
        """

    @classmethod
    @abstractmethod
    def infer(cls, results: Sequence[Sequence[Any]]) -> list[Self]:
        """Derives the controls of this kind from the regions that they drew.

        An export of a project holds no label config. A field of the task's data mostly has the name
        of the object tag that shows it, so `data_key` is set to that name.

        Args:
            results: the `result` of each annotation, as JSON.
        """

    @abstractmethod
    def read_regions(self, result: Sequence[Any]) -> ReadRegions:
        """Reads the regions that this control drew; those of other controls are ignored.

        Args:
            result: the `result` of an annotation or a prediction, as JSON; it may hold anything.
        """

    @abstractmethod
    def write_regions(
        self, found: Detections, names: Sequence[str], width: int, height: int
    ) -> list[dict[str, Any]]:
        """Writes detections as the `result` of a prediction.

        Args:
            found: `N` detections, in pixels of the upright image.
            names: `N` label names, as results carry them.
            width: width of the upright image, in pixels.
            height: height of the upright image, in pixels.

        Returns:
            The regions. Equal detections get equal ids each time.
        """


def labels_in(tag: ControlTag) -> tuple[Label, ...]:
    """Reads the labels inside a control tag; a label without value and alias is left out."""
    found = []
    for label in (tag.labels_attrs or {}).values():
        attributes = label.attr or {}
        name = attributes.get("value") or attributes.get("alias")
        if not name:
            continue
        values = attributes.get("predicted_values", "").split(",")
        found.append(
            Label(
                name,
                attributes.get("alias") or None,
                tuple(value.strip() for value in values if value.strip()),
            )
        )
    return tuple(found)


def labels_tag_of(media: Media, tags: Sequence[ControlTag]) -> ControlTag | None:
    """Finds the first `Labels` tag with a label on an object tag; None if there is none."""
    for tag in tags:
        if (
            tag.tag == "Labels"
            and tag.name
            and media.name in (tag.to_name or ())
            and labels_in(tag)
        ):
            return tag
    return None


def score_threshold_of(*tags: ControlTag) -> float | None:
    """Reads `model_score_threshold` from the first of several tags that has the attribute.

    Raises:
        ValueError: it is not a number in `[0, 1]`.
    """
    for tag in tags:
        text = (tag.attr or {}).get("model_score_threshold")
        if text is None:
            continue
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ValueError(
                f'model_score_threshold="{text}" of {tag.name} must be a number from 0 to 1'
            )
        return value
    return None


def first_known(names: object, labels: Sequence[Label]) -> str | None:
    """Picks the first of a region's label names that a control has; None if it has none.

    Args:
        names: the names, as JSON.
        labels: the control's labels.
    """
    known = {label.output for label in labels}
    given = names if isinstance(names, list) else []
    return next((name for name in given if isinstance(name, str) and name in known), None)


def unknown_label(names: object) -> str:
    """Says that a region has no label of the label config."""
    given = names if isinstance(names, list) else []
    return f"a region's label {', '.join(map(str, given)) or '(none)'} is not in the config"


def origin_of(region: Mapping[str, Any]) -> str | None:
    """Reads where a region came from; None if Label Studio does not say it."""
    origin = region.get("origin")
    return origin if isinstance(origin, str) else None
