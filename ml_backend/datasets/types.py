"""The values that readers and writers of data sets exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ml_backend.detection.types import Sample


class DatasetError(ValueError):
    """A data set cannot be read or written; the text says why, and the remedy."""


@dataclass(frozen=True, slots=True)
class LabelledData:
    """A labelled data set.

    Attributes:
        labels: names of the labels that have a box; a sample's labels are indices into it. They are
            in the order of the data set where it declares one (COCO, YOLO), else sorted by name.
        samples: its images, by key. The key is the image file's path below the data set's folder.
            An image that is annotated as empty is a sample without a box.
        left_out: number of things that were left out, by reason.
    """

    labels: tuple[str, ...]
    samples: tuple[Sample, ...]
    left_out: dict[str, int]


class Omissions:
    """Counts what a reader leaves out, by reason, and warns about the first of each.

    Args:
        on_warning: receives the warnings, one sentence each.

    Attributes:
        counts: how often something was left out, by reason.
    """

    def __init__(self, on_warning: Callable[[str], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._on_warning = on_warning
        self._warned: set[str] = set()

    def add(self, reason: str, where: object) -> None:
        """Counts something that is left out.

        Args:
            reason: why, without the place, so that equal reasons are counted together.
            where: the file or task, for the warning.
        """
        self.counts[reason] += 1
        self.warn(reason, where)

    def warn(self, reason: str, where: object) -> None:
        """Warns about something that is doubtful and used nevertheless."""
        if reason not in self._warned:
            self._warned.add(reason)
            self._on_warning(f"{where}: {reason}")
