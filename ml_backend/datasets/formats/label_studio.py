"""Label Studio's export of a project as JSON: a list of tasks with their annotations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np

from ml_backend.datasets.folder import IMAGE_SUFFIXES, Folder, Scope
from ml_backend.datasets.formats.base import AnnotatedImage, Annotations, DatasetFormat
from ml_backend.datasets.types import DatasetError, Omissions
from ml_backend.detection.types import Detections
from ml_backend.label_studio.controls.base import Control, Label
from ml_backend.label_studio.controls.rectangle_labels import RectangleLabels
from ml_backend.label_studio.label_config import control_kinds

_LOCAL_FILES = "/data/local-files/"


class LabelStudioExport(DatasetFormat):
    """A project's export as JSON, which Label Studio also imports.

    Of several annotations of a task one counts, as in a training: the ground truth, or else the
    newest. An export has no label config, so its controls are derived from its results. Written is
    `tasks.json` for a `RectangleLabels` named `label` on an `Image` named `image`; images are
    addressed as local files below the data set's folder.
    """

    description = "an export of Label Studio as JSON (a list of tasks with data and annotations)"
    file_suffixes = frozenset({".json"})

    def recognises(self, folder: Folder) -> bool:
        """Says whether a JSON file is an export, or the shorter one named JSON-MIN."""
        return any(
            _holds(content, "data", "annotations") or _holds(content, "annotation_id")
            for _, content in folder.json_contents
        )

    def read(self, folder: Folder, omissions: Omissions) -> Annotations:
        """Reads the boxes of all exports.

        Raises:
            DatasetError: there is an export as JSON-MIN alone.
        """
        tasks: list[Any] = []
        for _, content in folder.json_contents:
            if _holds(content, "data", "annotations"):
                tasks += content
        if not tasks:
            shortened = next(f for f, c in folder.json_contents if _holds(c, "annotation_id"))
            raise DatasetError(
                f"{folder.root / shortened} is an export as JSON-MIN, which does not tell one "
                "control's boxes from another's: export the project as JSON"
            )
        chosen: list[tuple[dict[str, Any], list[Any]]] = []
        for task in tasks:
            result = _result_that_counts(task)
            if result is None:
                omissions.add("the task is skipped, or not annotated", _task_name(task))
            else:
                chosen.append((task, result))
        kinds = control_kinds()
        results = [result for _, result in chosen]
        inferred = [control for kind in kinds for control in kind.infer(results)]
        controls = sorted(inferred, key=lambda control: (control.from_name, control.to_name))
        names = sorted({label.output for control in controls for label in control.labels})
        readable = frozenset[str]().union(*(kind.result_types for kind in kinds))
        return Annotations(names, _images(chosen, controls, readable, folder, omissions))

    def write(self, annotations: Annotations, folder: Path) -> None:
        """Writes `tasks.json`; a task's id is its image's position, beginning with 1."""
        control = RectangleLabels("label", "image", "image", tuple(map(Label, annotations.names)))
        tasks = [
            {
                "id": number,
                "data": {"image": f"{_LOCAL_FILES}?d={quote(str(one.image))}"},
                "annotations": [{"result": _result(one, control)}],
            }
            for number, one in enumerate(annotations.images, 1)
        ]
        (folder / "tasks.json").write_text(json.dumps(tasks))


def _holds(content: object, *keys: str) -> bool:
    """Tells whether a JSON value is a list with an object that has all the keys."""
    return isinstance(content, list) and any(
        isinstance(one, dict) and all(key in one for key in keys) for one in content
    )


def _images(
    chosen: Sequence[tuple[dict[str, Any], list[Any]]],
    controls: Sequence[Control],
    readable: frozenset[str],
    folder: Folder,
    omissions: Omissions,
) -> Iterator[AnnotatedImage]:
    to_names = {control.to_name for control in controls}
    for task, result in chosen:
        addresses = {key: a for key, v in task["data"].items() if (a := _image_path(v))}
        several = len(addresses) > 1
        if not addresses:
            omissions.add("the task's data has no image", _task_name(task))
        if several:
            # Only a label config says which field an <Image> shows; mostly it has the same name.
            addresses = {key: a for key, a in addresses.items() if key in to_names}
            if not addresses:
                omissions.add(
                    "of several images in the task's data none has the name of an annotated one",
                    _task_name(task),
                )
        for region in result:
            kind = str(region.get("type", "")) if isinstance(region, dict) else ""
            if kind.endswith("labels") and kind not in readable:
                omissions.add(f"a region is no rectangle ({kind})", _task_name(task))
        for key, address in addresses.items():
            image = folder.image(address, Scope(PurePosixPath()))
            if isinstance(image, str):
                omissions.add(image, address)
                continue
            boxes = []
            for control in controls:
                if several and control.to_name != key:
                    continue
                read = control.read_regions(result)
                for dropped in read.dropped:
                    omissions.add(dropped, _task_name(task))
                boxes += [(r.label, r.x1, r.y1, r.x2, r.y2) for r in read.regions]
            yield AnnotatedImage(image, boxes, fractions=True)


def _task_name(task: Any) -> str:
    return f"task {task.get('id', '?') if isinstance(task, dict) else '?'}"


def _result_that_counts(task: Any) -> list[Any] | None:
    """Selects the result of the annotation that counts, by the rule of `training.dataset`."""
    if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
        return None
    annotations = task.get("annotations")
    usable = [
        a
        for a in (annotations if isinstance(annotations, list) else [])
        if isinstance(a, dict) and isinstance(a.get("result"), list) and not a.get("was_cancelled")
    ]
    if not usable:
        return None

    def rank(annotation: dict[str, Any]) -> tuple[bool, datetime]:
        try:
            moment = datetime.fromisoformat(str(annotation.get("updated_at")))
        except ValueError:
            moment = datetime.min
        return bool(annotation.get("ground_truth")), moment.replace(tzinfo=moment.tzinfo or UTC)

    # Of several that rank equally, the last one.
    result: list[Any] = sorted(usable, key=rank)[-1]["result"]
    return result


def _image_path(value: object) -> str | None:
    """Finds the path in an address: `/data/upload/1/a.jpg`, `/data/local-files/?d=a.jpg`, …"""
    if not isinstance(value, str):
        return None
    try:
        parts = urlsplit(value)
    except ValueError:
        return None
    path = unquote(parts.path)
    if path.endswith(_LOCAL_FILES):
        path = parse_qs(parts.query).get("d", [""])[0]
    suffix = PurePosixPath(path.replace("\\", "/")).suffix.lower()
    return path if suffix in IMAGE_SUFFIXES else None


def _result(one: AnnotatedImage, control: Control) -> list[dict[str, Any]]:
    corners = np.array([box[1:] for box in one.boxes], np.float32).reshape(-1, 4)
    count = len(one.boxes)
    drawn = Detections(corners, np.ones(count, np.float32), np.zeros(count, np.int64))
    width, height = (int(str(side)) for side in one.size or (1, 1))
    regions = control.write_regions(drawn, [box[0] for box in one.boxes], width, height)
    # A score belongs to a prediction, not to an annotation.
    return [{k: v for k, v in region.items() if k != "score"} for region in regions]
