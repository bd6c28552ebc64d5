"""Reading data sets: every format, what is left out, and the errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml_backend.datasets.reader import read_dataset
from ml_backend.datasets.types import DatasetError
from ml_backend.detection.decoding import decode_image
from tests.dataset_files import (
    FIVE,
    LABELS,
    WRITERS,
    Picture,
    boxes_of,
    coco_content,
    export_region,
    export_task,
    save_images,
    write_coco,
    write_json,
    write_label_studio,
    write_voc,
    write_yolo,
)


def test_read_dataset_same_images_in_four_formats_give_the_same_samples(tmp_path: Path) -> None:
    writers = (write_coco, write_voc, write_yolo, write_label_studio)
    read = []
    for writer in writers:
        folder = tmp_path / writer.__name__
        writer(folder, FIVE)
        data = read_dataset(folder, _no_warning)
        assert data.labels == LABELS
        assert data.left_out == {}
        for sample in data.samples:
            image = decode_image(sample.image)
            assert (sample.boxes <= [image.width, image.height] * 2).all()
            assert sample.boxes.dtype == np.float32
            assert sample.labels.dtype == np.int64
        read.append([(s.image.name, boxes_of(data, s)) for s in data.samples])
    wanted = [(name, [(b[0], *map(float, b[1:])) for b in boxes]) for name, *_, boxes in FIVE]
    for writer, found in zip(writers, read, strict=True):
        assert [name for name, _ in found] == [name for name, _ in wanted], writer
        for (name, boxes), (_, others) in zip(found, wanted, strict=True):
            assert [b[0] for b in boxes] == [b[0] for b in others], (writer, name)
            for ours, theirs in zip(boxes, others, strict=True):
                assert ours[1:] == pytest.approx(theirs[1:], abs=1e-3), (writer, name)


def test_read_dataset_keys_are_image_paths_in_sorted_order(tmp_path: Path) -> None:
    write_coco(tmp_path, FIVE[::-1])
    data = read_dataset(tmp_path)
    assert [s.key for s in data.samples] == [f"images/{name}" for name, *_ in FIVE]
    assert [s.image for s in data.samples] == [tmp_path / s.key for s in data.samples]


@pytest.mark.parametrize("form", ["coco", "coco in one folder", "voc", "yolo", "yolo, turned"])
def test_read_dataset_splits_with_equal_file_names_become_one(tmp_path: Path, form: str) -> None:
    """One image of the same name in each split; `b.png` is in `train` alone."""
    train = [("1.jpg", 80, 60, 1, [("car", 1, 2, 30, 40)]), FIVE[1]]
    valid = [("1.jpg", 50, 90, 1, [("truck", 5, 6, 7, 88)])]
    if form == "coco in one folder":
        for split, pictures in (("train", train), ("valid", valid)):
            save_images(tmp_path / "images" / split, pictures)
            write_json(tmp_path / f"annotations/instances_{split}.json", coco_content(pictures))
    elif form == "yolo, turned":
        for split, pictures in (("train", train), ("valid", valid)):
            write_yolo(tmp_path, pictures, images=f"images/{split}", labels=f"labels/{split}")
    else:
        for split, pictures in (("train", train), ("valid", valid)):
            if form == "coco":
                save_images(tmp_path / split, pictures)
                write_json(tmp_path / split / "_annotations.coco.json", coco_content(pictures))
            elif form == "voc":
                write_voc(tmp_path / split, pictures, annotations=".", images=".")
            else:
                write_yolo(tmp_path / split, pictures)
        if form == "yolo":
            (tmp_path / "train/data.yaml").rename(tmp_path / "data.yaml")
            (tmp_path / "valid/data.yaml").unlink()
    data = read_dataset(tmp_path, _no_warning)
    assert len({s.key for s in data.samples}) == 3
    boxes = {s.key: boxes_of(data, s) for s in data.samples}
    assert [b[0] for key in boxes if "valid" in key for b in boxes[key]] == ["truck"]
    assert [b[0] for key in boxes if "train/" in key for b in boxes[key]] == ["car", "truck"]


def test_read_dataset_image_missing_in_a_split_is_not_taken_elsewhere(
    tmp_path: Path,
) -> None:
    one: list[Picture] = [("1.jpg", 80, 60, 1, [("car", 1, 2, 30, 40)])]
    for split in ("train", "val"):
        save_images(tmp_path / "images" / split, [*one, FIVE[1]])
        write_json(tmp_path / f"annotations/{split}.json", coco_content([*one, FIVE[1]]))
    (tmp_path / "images/val/1.jpg").unlink()
    data = read_dataset(tmp_path, lambda _: None)
    assert [s.key for s in data.samples] == [
        "images/train/1.jpg",
        "images/train/b.png",
        "images/val/b.png",
    ]
    assert data.left_out == {"the image file is missing": 1}


@pytest.mark.parametrize("form", ["coco", "voc", "yolo", "label_studio"])
def test_read_dataset_missing_and_broken_images_are_left_out(tmp_path: Path, form: str) -> None:
    WRITERS[form](tmp_path, FIVE)
    (missing,) = tmp_path.rglob("*a.jpg")
    missing.unlink()
    (broken,) = tmp_path.rglob("*b.png")
    broken.write_text("no image")
    told: list[str] = []
    data = read_dataset(tmp_path, told.append)
    assert [s.image.name for s in data.samples] == ["c.jpg", "d.jpg", "e.jpg"]
    assert data.labels == ("car",)
    assert data.left_out == {
        "the image file is missing": 1,
        "the image file cannot be read": 1,
    }
    assert len(told) == 2
    assert any("b.png: the image file cannot be read" in line for line in told)


def test_read_coco_invalid_entries_are_counted_as_left_out(tmp_path: Path) -> None:
    content = coco_content(FIVE)
    content["categories"].insert(0, {"id": 99, "name": "things", "supercategory": "none"})
    changes: list[dict[str, Any]] = [
        {"iscrowd": 1, "segmentation": {"counts": [1], "size": [2, 2]}},
        {"bbox": [10, 10, 0, 5]},
        {"bbox": [900, 10, 5, 5]},
        {"bbox": [10, 10, -5, 5]},
        {"bbox": [1, 2, 3]},
        {"bbox": [1, 2, float("nan"), 4]},
        {"category_id": 7},
        {"category_id": [7]},
        {"image_id": 1234},
        {"image_id": {}},
        {"bbox": [40, 10, 1000, 5]},
    ]
    for number, change in enumerate(changes):
        annotation = {"id": 100 + number, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]}
        content["annotations"].append(annotation | change)
    content["annotations"].append("nonsense")
    content["images"] += [{"id": 77}, None]
    save_images(tmp_path / "images", FIVE)
    write_json(tmp_path / "annotations.json", content)
    data = read_dataset(tmp_path / "annotations.json", lambda _: None)
    assert data.labels == LABELS
    assert boxes_of(data, data.samples[0])[-1] == ("car", 40, 10, 80, 15)
    assert sum(len(s.boxes) for s in data.samples) == 7
    assert data.left_out == {
        "a crowd (iscrowd) is no single object": 1,
        "a box has no area inside the image": 3,
        "the part of a box that is outside of the image": 1,
        "an annotation has no image_id, no category_id, or no bbox of four numbers": 4,
        "a box has a coordinate that is not finite": 1,
        "an annotation's category is not in the list": 1,
        "an annotation's image is not in the list": 1,
        "an image of the list has no id or no file_name": 2,
    }


def test_read_coco_wrong_image_size_gives_a_warning(tmp_path: Path) -> None:
    content = coco_content(FIVE)
    content["images"][0] |= {"width": 60, "height": 80}
    content["images"][1] |= {"width": 0, "height": 0}
    save_images(tmp_path / "images", FIVE)
    write_json(tmp_path / "annotations.json", content)
    told: list[str] = []
    data = read_dataset(tmp_path, told.append)
    assert len(data.samples) == 5
    assert data.left_out == {}
    assert told == [
        "images/a.jpg: the annotations say 60 x 80 pixels, but upright it has 80 x 60: boxes are "
        "taken as pixels of the upright image"
    ]


def test_read_coco_image_in_two_files_is_used_once(tmp_path: Path) -> None:
    """As COCO has it: `instances_val.json` and `person_keypoints_val.json`, and captions."""
    save_images(tmp_path / "val", FIVE)
    write_json(tmp_path / "annotations/instances_val.json", coco_content(FIVE))
    write_json(tmp_path / "annotations/person_keypoints_val.json", coco_content(FIVE))
    write_json(tmp_path / "annotations/captions_val.json", {"images": [], "annotations": []})
    data = read_dataset(tmp_path, lambda _: None)
    assert sum(len(s.boxes) for s in data.samples) == 6
    assert data.left_out == {"the image is annotated before: the first counts": 5}


def test_read_yolo_polygons_are_read_and_invalid_lines_left_out(
    tmp_path: Path,
) -> None:
    save_images(tmp_path / "images", FIVE[:1])
    save_images(tmp_path / "images/unlabelled", FIVE[1:2])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text(
        "0 0.5 0.5 0.5 0.5 0.93\n"
        "\n"
        "1 0.1 0.1 0.5 0.1 0.5 0.9 0.1 0.9\n"
        "7 0.5 0.5 0.5 0.5\n"
        "0 0.5 0.5 0.5\n"
        "0 0.5 x 0.5 0.5\n"
    )
    (tmp_path / "labels/gone.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("path: elsewhere\nnames:\n  1: truck\n  0: car\n")
    data = read_dataset(tmp_path, lambda _: None)
    assert [s.key for s in data.samples] == ["images/a.jpg"]
    assert boxes_of(data, data.samples[0]) == [
        ("car", 20, 15, 60, 45),
        ("truck", 8, 6, 40, 54),
    ]
    assert data.left_out == {
        "the image's folder has no label files": 1,
        "a line's class is not among the names": 1,
        "a line of labels has no class and box": 1,
        "a line of labels has something that is no number": 1,
        "the image file is missing": 1,
    }


def test_read_yolo_label_files_beside_the_images_are_read(tmp_path: Path) -> None:
    write_yolo(tmp_path, FIVE, images=".", labels=".")
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("car\ntruck\n")
    data = read_dataset(tmp_path, _no_warning)
    assert [s.key for s in data.samples] == [name for name, *_ in FIVE]
    assert data.labels == LABELS


def test_read_voc_image_of_equal_stem_is_used_and_not_its_mask(tmp_path: Path) -> None:
    write_voc(tmp_path, FIVE)
    save_images(tmp_path / "SegmentationClass", [("a.png", 80, 60, 1, [])])
    (tmp_path / "Annotations/bad.xml").write_text("<annotation>")
    (tmp_path / "Annotations/evil.xml").write_text("<!DOCTYPE a []><annotation/>")
    (tmp_path / "Annotations/e.xml").write_text(
        "<annotation><filename>renamed.jpg</filename><object><name>car</name></object>"
        "<object><name>car</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4.5</xmax>"
        "<ymax>4</ymax></bndbox></object></annotation>"
    )
    data = read_dataset(tmp_path, lambda _: None)
    assert [s.key for s in data.samples] == [f"JPEGImages/{name}" for name, *_ in FIVE]
    assert boxes_of(data, data.samples[-1]) == [("car", 0, 0, 4.5, 4)]
    assert data.left_out == {
        "an XML file cannot be read": 2,
        "an object has no name, or no bndbox of four numbers": 1,
    }


def test_read_label_studio_several_annotations_uses_truth_or_newest(
    tmp_path: Path,
) -> None:
    save_images(tmp_path, FIVE)

    def annotation(label: str, second: int, **more: Any) -> dict[str, Any]:
        moment = f"2026-01-01T00:00:{second:02}Z"
        return {"result": [export_region(("x", label))], "updated_at": moment, **more}

    tasks = [
        export_task("a.jpg", annotation("old", 1), annotation("new", 3), annotation("older", 0)),
        export_task("b.png", annotation("truth", 1, ground_truth=True), annotation("new", 3)),
        export_task("c.jpg", annotation("kept", 1), annotation("skipped", 3, was_cancelled=True)),
        export_task("d.jpg", annotation("skipped", 3, was_cancelled=True)),
        export_task("e.jpg"),
        export_task("s3://bucket/folder/gone.jpg", annotation("new", 1)),
        {"id": 9, "data": {"text": "a.jpg has no image here"}, "annotations": [annotation("x", 1)]},
    ]
    write_json(tmp_path / "export.json", tasks)
    data = read_dataset(tmp_path, lambda _: None)
    assert [[b[0] for b in boxes_of(data, s)] for s in data.samples] == [
        ["new"],
        ["truth"],
        ["kept"],
    ]
    assert data.left_out == {
        "the task is skipped, or not annotated": 2,
        "the image file is missing": 1,
        "the task's data has no image": 1,
    }


def test_read_label_studio_controls_are_derived_from_the_results(tmp_path: Path) -> None:
    """Rectangle with Labels, a rotated rectangle, a polygon, and two images in one task."""
    save_images(tmp_path / "upload/1", FIVE)
    place = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0}
    both = {"to_name": "image", "original_width": 80, "original_height": 60}
    first = [
        {"id": "1", "from_name": "box", "type": "rectangle", "value": place, **both},
        {
            "id": "1",
            "from_name": "kind",
            "type": "labels",
            "value": {**place, "labels": ["car"]},
            **both,
        },
        {
            "id": "2",
            "from_name": "label",
            "type": "rectanglelabels",
            "value": {
                **{"x": 50, "y": 0, "width": 25, "height": 50, "rotation": 90},
                "rectanglelabels": ["truck"],
            },
            **both,
        },
        {
            "id": "3",
            "from_name": "shape",
            "type": "polygonlabels",
            "value": {"points": [[0, 0], [1, 1], [0, 1]], "polygonlabels": ["car"]},
            **both,
        },
    ]
    other = export_region(("x", "car")) | {"to_name": "second", "from_name": "label2"}
    tasks = [
        {"id": 1, "data": {"image": "/data/upload/1/a.jpg"}, "annotations": [{"result": first}]},
        {
            "id": 2,
            "data": {"image": "/data/local-files/?d=x%2Fb.png", "second": "upload/1/e.jpg"},
            "annotations": [{"result": [other]}],
        },
    ]
    write_json(tmp_path / "export.json", tasks)
    data = read_dataset(tmp_path / "export.json", lambda _: None)
    assert [s.key for s in data.samples] == [f"upload/1/{n}" for n in ("a.jpg", "b.png", "e.jpg")]
    (box, turned), empty, (second,) = (boxes_of(data, s) for s in data.samples)
    assert (box[0], turned[0], second[0], empty) == ("car", "truck", "car", [])
    assert box[1:] == pytest.approx((8, 12, 32, 36))
    # 20 x 30 pixels, turned about their corner at (40, 0).
    assert turned[1:] == pytest.approx((10, 0, 40, 20), abs=1e-3)
    assert data.left_out == {"a region is no rectangle (polygonlabels)": 1}


def _nothing(path: Path) -> None:
    path.mkdir()


def _archive(path: Path) -> None:
    path.write_bytes(b"PK")


def _json_min(path: Path) -> None:
    write_json(
        path / "project.json", [{"image": "a.jpg", "id": 1, "annotation_id": 4, "label": []}]
    )


def _no_images(path: Path) -> None:
    write_json(path / "annotations.json", coco_content(FIVE))


def _no_boxes(path: Path) -> None:
    write_voc(path, FIVE[2:3])


def _damaged(path: Path) -> None:
    path.mkdir()
    (path / "annotations.json").write_text('{"images": [')


def _bad_yaml(path: Path) -> None:
    write_yolo(path, FIVE)
    (path / "data.yaml").write_text("names: [car\n")


def _odd_names(path: Path) -> None:
    write_yolo(path, FIVE)
    (path / "data.yaml").write_text("names: {car: 1}\n")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "there is no .*: give the folder"),
        (_nothing, r"looked for COCO \(a JSON file .*data\.yaml or classes\.txt.*XML"),
        (_archive, "an archive must be unpacked first"),
        (_json_min, r"project\.json is an export as JSON-MIN.*: export the project as JSON"),
        (_no_images, r"\(5 times: the image file is missing\): put the image files below"),
        (_no_boxes, "holds 1 images and no box"),
        (_damaged, r"annotations\.json is no valid JSON .*: export it again"),
        (_bad_yaml, r"data\.yaml is no valid YAML"),
        (_odd_names, r"names in .*data\.yaml must be a list"),
    ],
)
def test_read_dataset_unreadable_data_set_error_is_one_line_with_the_path(
    tmp_path: Path, write: Callable[[Path], None], words: str
) -> None:
    write(tmp_path / "data")
    with pytest.raises(DatasetError, match=words) as caught:
        read_dataset(tmp_path / "data", lambda _: None)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_dataset_other_json_file_error_lists_the_json_formats(tmp_path: Path) -> None:
    write_json(tmp_path / "other.json", {"version": 1})
    with pytest.raises(DatasetError, match=r"is neither COCO .* nor an export of Label Studio"):
        read_dataset(tmp_path / "other.json")


def test_read_dataset_broken_json_file_beside_it_is_left_out(
    tmp_path: Path,
) -> None:
    write_yolo(tmp_path, FIVE)
    (tmp_path / "package.json").write_text("{ not json")
    found = read_dataset(tmp_path, lambda _: None)
    assert len(found.samples) == len(FIVE)
    assert found.left_out["the file is no valid JSON"] == 1


def test_read_dataset_truncated_images_are_read_by_their_head(
    tmp_path: Path,
) -> None:
    """The head of a file, before its pixels, holds the size."""
    write_yolo(tmp_path, FIVE)
    for image in (tmp_path / "images").iterdir():
        content = image.read_bytes()
        # Up to where the pixels begin.
        end = content.index(b"IDAT" if image.suffix == ".png" else b"\xff\xda")
        image.write_bytes(content[: end + 20])
    data = read_dataset(tmp_path, _no_warning)
    assert len(data.samples) == 5


def test_read_dataset_symbolic_link_to_a_parent_folder_is_followed_once(tmp_path: Path) -> None:
    write_coco(tmp_path, FIVE)
    (tmp_path / "images/again").symlink_to(tmp_path)
    assert len(read_dataset(tmp_path, _no_warning).samples) == 5


def _no_warning(text: str) -> None:
    pytest.fail(text)
