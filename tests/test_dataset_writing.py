"""Writing data sets: what is written reads back the same, in every format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ml_backend.datasets.reader import read_dataset
from ml_backend.datasets.types import DatasetError, LabelledData
from ml_backend.datasets.writer import write_dataset
from ml_backend.detection.types import Sample
from ml_backend.extensions import DATASET_FORMATS, UnknownExtension
from tests.dataset_files import FIVE, boxes_of, save_images, write_coco
from tests.extension import install_extension

FORMATS = list(DATASET_FORMATS)
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS)
# Paths of image files, without suffix: spaces, other scripts, names that formats give a meaning.
PARTS = ("a", "b c", "größe", "写真 1", "x&y", "100%", "a+b", "images", "labels", "Annotations")
PATHS = st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3), min_size=1, max_size=6)


def _sample(folder: Path, key: str, boxes: list[list[float]], labels: list[int]) -> Sample:
    file = folder / key
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 60), "grey").save(file)
    return Sample(key, file, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64))


def _assert_same(read: LabelledData, written: LabelledData, below: str) -> None:
    """Compares keys, labels' names and boxes; written keys are those below `images/`."""
    assert read.left_out == {}
    by_key = {sample.key: sample for sample in read.samples}
    assert sorted(by_key) == sorted(f"{below}/{s.key}" for s in written.samples)
    for sample in written.samples:
        found = boxes_of(read, by_key[f"{below}/{sample.key}"])
        wanted = boxes_of(written, sample)
        assert [box[0] for box in found] == [box[0] for box in wanted]
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours[1:] == pytest.approx(theirs[1:], abs=1e-3)


def _image_folder(format: str) -> str:
    folder: str = DATASET_FORMATS.load(format).image_folder
    return folder


@EVERY_FORMAT
def test_write_dataset_then_read_dataset_gives_the_same_samples(
    format: str, tmp_path: Path
) -> None:
    """The first image is rotated by EXIF, the third one is annotated as empty."""
    write_coco(tmp_path / "source", [FIVE[3], FIVE[0], FIVE[2], FIVE[1]])
    data = read_dataset(tmp_path / "source")
    write_dataset(data, tmp_path / "copy", format)
    read = read_dataset(tmp_path / "copy", pytest.fail)
    assert read.labels == data.labels
    assert read.left_out == {}
    assert [Path(s.key).name for s in read.samples] == [Path(s.key).name for s in data.samples]
    for ours, theirs in zip(read.samples, data.samples, strict=True):
        assert ours.image.read_bytes() == theirs.image.read_bytes()
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.boxes == pytest.approx(theirs.boxes, abs=1e-3)


@EVERY_FORMAT
def test_write_dataset_unicode_labels_and_fractions_of_pixels_are_kept(
    format: str, tmp_path: Path
) -> None:
    boxes: list[list[float]] = [[0.25, 1.5, 33.333, 59.999], [79, 59, 80, 60]]
    data = LabelledData(
        ("weiße Blutkörperchen", "<b> & c", "no"),
        (_sample(tmp_path / "source", "größe 1.png", [*boxes, boxes[0]], [1, 0, 2]),),
        {},
    )
    write_dataset(data, tmp_path / "copy", format)
    read = read_dataset(tmp_path / "copy", pytest.fail)
    _assert_same(read, data, _image_folder(format))


@EVERY_FORMAT
@given(paths=PATHS)
@settings(max_examples=25, deadline=None)
def test_write_dataset_any_image_paths_are_found_again(
    format: str, paths: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("paths")
    # `_` before each path: a first `images` would be taken for the folder of the images.
    keys = dict.fromkeys("/".join(["_", *path]) + ".png" for path in paths)
    samples = tuple(
        _sample(folder / "source", key, [[i, i, i + 10, i + 20]], [0]) for i, key in enumerate(keys)
    )
    data = LabelledData(("car",), samples, {})
    write_dataset(data, folder / "copy", format)
    _assert_same(read_dataset(folder / "copy", pytest.fail), data, _image_folder(format))


@EVERY_FORMAT
def test_write_dataset_images_that_differ_in_suffix_or_case_get_a_number(
    format: str, tmp_path: Path
) -> None:
    keys = ["a.png", "a.bmp", "A.png", "a-2.png"]
    samples = tuple(
        _sample(tmp_path / f"source-{i}", key, [[i, 0, i + 1, 9]], [0])
        for i, key in enumerate(keys)
    )
    write_dataset(LabelledData(("car",), samples, {}), tmp_path / "copy", format)
    read = read_dataset(tmp_path / "copy", pytest.fail)
    found = {Path(s.key).name: s.boxes[0, 0] for s in read.samples}
    assert found == {"a.png": 0, "a-2.bmp": 1, "A-3.png": 2, "a-2-2.png": 3}


@EVERY_FORMAT
def test_write_dataset_key_that_leads_out_of_the_folder_stays_inside(
    format: str, tmp_path: Path
) -> None:
    sample = _sample(tmp_path / "source", "a.png", [[1, 2, 3, 4]], [0])
    outside = Sample("/../../.hidden/a.png", sample.image, sample.boxes, sample.labels)
    write_dataset(LabelledData(("car",), (outside,), {}), tmp_path / "in/copy", format)
    (read,) = read_dataset(tmp_path / "in/copy", pytest.fail).samples
    assert read.key == f"{_image_folder(format)}/_/_/hidden/a.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "source"]


def test_write_dataset_full_folder_error_names_it(tmp_path: Path) -> None:
    save_images(tmp_path / "copy", FIVE[:1])
    with pytest.raises(DatasetError, match=r"copy is not an empty folder: give a new one"):
        write_dataset(LabelledData((), (), {}), tmp_path / "copy", "coco")


def test_write_dataset_unreadable_image_error_names_it(tmp_path: Path) -> None:
    sample = _sample(tmp_path / "source", "a.png", [[1, 2, 3, 4]], [0])
    data = LabelledData(("car",), (sample,), {})
    sample.image.write_text("not an image")
    with pytest.raises(DatasetError, match=r"a\.png cannot be read"):
        write_dataset(data, tmp_path / "damaged", "coco")
    sample.image.unlink()
    with pytest.raises(DatasetError, match=r"a\.png cannot be read"):
        write_dataset(data, tmp_path / "missing", "coco")


def test_write_dataset_unknown_format_error_lists_the_formats(tmp_path: Path) -> None:
    with pytest.raises(UnknownExtension, match="'tfrecord': it must be one of coco, label_studio"):
        write_dataset(LabelledData((), (), {}), tmp_path / "copy", "tfrecord")


def test_format_of_an_entry_point_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_extension(DATASET_FORMATS, "csv", "tests.csv_format:Csv", tmp_path, monkeypatch)
    data = LabelledData(
        ("car",),
        (
            _sample(tmp_path / "source", "a.png", [[1, 2, 30, 40]], [0]),
            _sample(tmp_path / "source", "b.png", [], []),
        ),
        {},
    )
    write_dataset(data, tmp_path / "copy", "csv")
    _assert_same(read_dataset(tmp_path / "copy", pytest.fail), data, "images")
    with pytest.raises(DatasetError, match=r"Pascal VOC \(XML files\), CSV \(boxes\.csv\)"):
        empty = tmp_path / "empty"
        empty.mkdir()
        read_dataset(empty)
