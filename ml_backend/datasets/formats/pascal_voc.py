"""Pascal VOC: an XML file for each image."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, ParseError, SubElement, tostring

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from torchvision.datasets import VOCDetection

from ml_backend.datasets.folder import Folder
from ml_backend.datasets.formats.base import AnnotatedImage, Annotations, Box, DatasetFormat
from ml_backend.datasets.types import Omissions

_NO_BOX = "an object has no name, or no bndbox of four numbers"


class PascalVoc(DatasetFormat):
    """The format of the PASCAL VOC challenges (development kit of 2012, section 8).

    Pixels are counted from 1, and the last one belongs to the box. Read are `Annotations/*.xml`, or
    XML files beside the images. Written are `Annotations/` and `JPEGImages/`.
    """

    description = "Pascal VOC (XML files)"
    image_folder = "JPEGImages"

    def recognises(self, folder: Folder) -> bool:
        """Says whether an XML file has `annotation` for its root."""
        return any(_is_annotation(folder.root / file) for file in _xml_files(folder))

    def read(self, folder: Folder, omissions: Omissions) -> Annotations:
        """Reads the boxes of all such files; the image of a file may also have the file's name."""
        images: list[AnnotatedImage] = []
        for file in _xml_files(folder):
            root = _parsed(folder.root / file)
            if root is None:
                omissions.add("an XML file cannot be read", file)
                continue
            if root.tag != "annotation":
                continue
            content = VOCDetection.parse_voc_xml(root).get("annotation")
            # An empty element is parsed as a text, or as nothing.
            content = content if isinstance(content, dict) else {}
            name = str(content.get("filename", ""))
            image = folder.image(name, folder.scope_of(file), file.stem)
            if isinstance(image, str):
                omissions.add(image, file)
                continue
            boxes = []
            for thing in content.get("object", []):
                box = _box(thing)
                if isinstance(box, str):
                    omissions.add(box, file)
                else:
                    boxes.append(box)
            images.append(AnnotatedImage(image, boxes, size=_size(content.get("size"))))
        return Annotations(sorted({box[0] for one in images for box in one.boxes}), images)

    def write(self, annotations: Annotations, folder: Path) -> None:
        """Writes an XML file for each image; coordinates are whole numbers where the boxes are.

        `filename` is the image's name, or its path below the data set's folder if the name alone
        could mean several images.
        """
        images = list(annotations.images)
        names = Counter(one.image.name for one in images)
        for one in images:
            below = one.image.relative_to(self.image_folder)
            unique = names[one.image.name] == 1
            file = folder / "Annotations" / below.with_suffix(".xml")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(tostring(_element(one, unique), encoding="utf-8"))


def _xml_files(folder: Folder) -> list[PurePosixPath]:
    return [file for file in folder.files if file.suffix.lower() == ".xml"]


def _parsed(file: Path) -> Element | None:
    try:
        root: Element = fromstring(file.read_bytes(), forbid_dtd=True)
    except (ParseError, ValueError, DefusedXmlException):
        return None
    return root


def _is_annotation(file: Path) -> bool:
    root = _parsed(file)
    return root is not None and root.tag == "annotation"


def _box(thing: Any) -> Box | str:
    """Reads the box of an object, or answers the reason why there is none."""
    try:
        label, bounds = thing["name"], thing["bndbox"]
        x1, y1, x2, y2 = (float(bounds[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
    except (TypeError, KeyError, ValueError):
        return _NO_BOX
    if not isinstance(label, str) or not all(map(math.isfinite, (x1, y1, x2, y2))):
        return _NO_BOX
    return label, x1 - 1, y1 - 1, x2, y2


def _size(size: Any) -> tuple[object, object] | None:
    try:
        return int(size["width"]), int(size["height"])
    except (TypeError, KeyError, ValueError):
        return None


def _element(one: AnnotatedImage, unique: bool) -> Element:
    root = Element("annotation")
    SubElement(root, "folder").text = one.image.parent.name
    SubElement(root, "filename").text = one.image.name if unique else str(one.image)
    size = SubElement(root, "size")
    width, height = one.size or (0, 0)
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        SubElement(size, tag).text = str(value)
    for name, x1, y1, x2, y2 in one.boxes:
        thing = SubElement(root, "object")
        SubElement(thing, "name").text = name
        bounds = SubElement(thing, "bndbox")
        corners = (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2))
        for tag, number in corners:
            SubElement(bounds, tag).text = f"{number:.10g}"
    return root
