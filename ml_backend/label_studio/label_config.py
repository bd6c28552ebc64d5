"""Reads a project's label config: its controls, and which labels a pretrained detector knows."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from label_studio_sdk.label_interface.control_tags import ControlTag
from label_studio_sdk.label_interface.interface import LabelInterface
from label_studio_sdk.label_interface.object_tags import ObjectTag

from ml_backend.extensions import CONTROLS
from ml_backend.label_studio.controls.base import Control, Media

LARGEST = 1_000_000
"""Characters of a label config. A config of 20,000 labels has half as many."""


class LabelConfigError(ValueError):
    """A label config cannot be used; the text says why, for the admin who wrote it."""


class InvalidLabelConfig(LabelConfigError):
    """The label config is not valid."""


class NothingToDetect(LabelConfigError):
    """The label config has no control that a detector can predict for."""


@dataclass(frozen=True)
class LabelConfig:
    """The part of a label config that a detector needs.

    Attributes:
        controls: the controls that draw regions, at least one.
    """

    controls: tuple[Control, ...]

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of all labels as results carry them, each once, in the config's order."""
        found = (label.output for control in self.controls for label in control.labels)
        return tuple(dict.fromkeys(found))

    def controls_by_image(self) -> dict[str, tuple[Control, ...]]:
        """The controls of each image, by the field of a task's data that holds the image."""
        keys = dict.fromkeys(control.data_key for control in self.controls)
        return {key: tuple(c for c in self.controls if c.data_key == key) for key in keys}


@dataclass(frozen=True, slots=True)
class LabelMatch:
    """The labels that a pretrained detector knows, and those that it does not.

    Attributes:
        matched: the detector's classes, by label.
        unmatched: labels that no class stands for.
        mistaken: names in `predicted_values` that are not classes of the detector.
        suggestions: a class of a similar name, by unmatched label or mistaken name.
    """

    matched: dict[str, tuple[str, ...]]
    unmatched: tuple[str, ...]
    mistaken: tuple[str, ...]
    suggestions: dict[str, str]

    def in_words(self, weights: str) -> str:
        """Describes the match in one line, in which `weights` names the weights."""
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
        NothingToDetect: no control of a registered kind is in it.
        ExtensionError: a registered kind of control cannot be imported.
    """
    root = _checked(xml)
    if "".join(root.itertext()).strip() and not len(root):
        raise InvalidLabelConfig("the label config holds text and no tag")
    kinds = control_kinds()
    shown_by = dict.fromkeys(kind.media_tag for kind in kinds)
    try:
        interface = LabelInterface(xml)
        media = {o.name: _media(o) for o in interface.objects if o.tag in shown_by}
        tags = [tag for tag in interface.controls if tag.name]
    except Exception as error:
        # The parser raises errors of many types; each means that the config is not valid.
        raise InvalidLabelConfig(f"the label config is not valid: {error}") from error
    found: list[Control] = []
    for tag in tags:
        for shown in (media.get(name) for name in tag.to_name or ()):
            if shown is not None:
                found += _controls(kinds, tag, shown, tags)
    if not found:
        needed = ", or ".join(kind.needs for kind in kinds)
        raise NothingToDetect(
            f"there is nothing to detect in this label config: it needs {needed}, whose toName "
            "is an " + " or ".join(f'<{tag} value="$...">' for tag in shown_by)
        )
    return LabelConfig(tuple(found))


def control_kinds() -> list[type[Control]]:
    """Imports the kinds of controls that are registered, in the order of the registry.

    Raises:
        ExtensionError: one of them cannot be imported.
    """
    return [CONTROLS.load(name) for name in CONTROLS]


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


def _media(shown: ObjectTag) -> Media | None:
    # Without the dollar sign, the value is an address and not a field of the task's data.
    if not shown.name or not shown.value_name or not (shown.value or "").startswith("$"):
        return None
    return Media(str(shown.tag), shown.name, shown.value_name)


def _controls(
    kinds: Iterable[type[Control]], tag: ControlTag, media: Media, tags: Sequence[ControlTag]
) -> Iterator[Control]:
    for kind in kinds:
        if kind.media_tag != media.tag:
            continue
        try:
            control = kind.parse(tag, media, tags)
        except ValueError as error:
            raise InvalidLabelConfig(str(error)) from error
        if control is not None:
            yield control
