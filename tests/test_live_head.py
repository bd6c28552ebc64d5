"""Test live heads: what they find, what they withhold, how they are stored, and bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.architectures import efficientnet_lite
from ml_backend.detection.architectures.base import InputSize, Target, WeightsError
from ml_backend.detection.architectures.cells import CellDetector, cell_targets
from ml_backend.detection.costs import NEVER
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import evaluate
from ml_backend.detection.prediction import predict_samples
from ml_backend.detection.presets.lite import PRESET as LITE
from ml_backend.detection.types import Sample
from ml_backend.jobs.outcomes import Refused
from ml_backend.reasons import Code
from ml_backend.settings import load_settings
from ml_backend.store.states import JobKind
from ml_backend.store.tables import is_live_head
from ml_backend.training.dataset import Dataset
from ml_backend.training.live_head import MOST_IMAGES, LiveHead
from ml_backend.training.outcome import Live, TrainingOutcome
from ml_backend.wording import words

CPU = torch.device("cpu")
LABELS = SHAPES[:3]
SIZE = InputSize(128, 160)


def _samples(folder: Path, images: int, seed: int = 0) -> list[Sample]:
    samples = []
    shapes = generate(images, seed=seed, shapes=LABELS, width=320, height=240, most=3)
    for number, image in enumerate(shapes):
        path = folder / f"{seed}-{image.name}"
        path.write_bytes(image.encoded())
        labels = np.array([LABELS.index(name) for name in image.labels], np.int64)
        samples.append(Sample(f"{seed}-{number}-image", path, image.boxes, labels))
    return samples


def _dataset(samples: list[Sample], labels: tuple[str, ...] = LABELS) -> Dataset:
    numbers = {sample.key: number for number, sample in enumerate(samples)}
    return Dataset(labels, tuple(samples), numbers, numbers, frozenset(), len(samples))


def _fit(folder: Path, dataset: Dataset, live: Live | None = None) -> TrainingOutcome:
    settings = load_settings({"MODEL_DIR": str(folder), "ML_BACKEND_TRAIN_THREADS": "1"})
    return LiveHead(settings, CPU, lambda *_: None, folder / "features").fit(dataset, live)


def _quality(detector: Detector, samples: list[Sample]) -> float:
    found = predict_samples(detector, samples, max_pixels=10**6)
    return evaluate([found[s.key] for s in samples], samples, detector.labels).map50


def test_fit_six_images_finds_shapes_on_others_and_knows_how_well(tmp_path: Path) -> None:
    outcome = _fit(tmp_path, _dataset(_samples(tmp_path, 6)))
    assert _quality(outcome.detector, _samples(tmp_path, 12, seed=1)) > 0.6
    assert outcome.verdict.promote
    assert outcome.verdict.reason.code == Code.LIVE_HEAD_FITTED
    assert set(outcome.out_of_fold) == {f"0-{n}-image" for n in range(6)}
    assert outcome.measured_on == "6 parts of 6 images, each unseen by its head"
    # One image of each clip, for the novelty of others.
    assert outcome.reference.embeddings.shape == (6, 64)


def test_fit_saved_and_loaded_predicts_the_same(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 4)
    detector = _fit(tmp_path, _dataset(samples)).detector
    folder = tmp_path / "version"
    folder.mkdir()
    detector.save(folder)
    loaded = Detector.load(folder, CPU)
    assert loaded.preset.name == "live"
    before, after = (
        predict_samples(d, samples[:1], max_pixels=10**6)[samples[0].key]
        for d in (detector, loaded)
    )
    assert len(before)
    np.testing.assert_array_equal(before.boxes, after.boxes)
    np.testing.assert_array_equal(before.scores, after.scores)


def test_fit_label_whose_boxes_are_yet_to_come_is_never_shown(tmp_path: Path) -> None:
    outcome = _fit(tmp_path, _dataset(_samples(tmp_path, 4), (*LABELS, "Star")))
    assert "Star" not in outcome.detector.thresholds
    assert outcome.detector.labels == (*LABELS, "Star")


def test_fit_boxes_that_cost_more_than_drawing_are_withheld(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 4)
    # The label says nothing of the image: no head can find it on an image that it has not seen.
    random = np.random.default_rng(0)
    spoilt = [
        replace(
            s,
            boxes=np.array([[x, y, x + 25, y + 25]], np.float32),
            labels=np.zeros(1, np.int64),
        )
        for s, (x, y) in zip(samples, random.uniform(0, 200, (4, 2)), strict=True)
    ]
    outcome = _fit(tmp_path, _dataset(spoilt, ("Nothing",)))
    assert outcome.detector.thresholds == {"Nothing": NEVER}
    assert "boxes of Nothing are withheld" in words(outcome.verdict.reason)


def test_fit_again_computes_no_features_anew_and_forgets_those_of_other_images(
    tmp_path: Path,
) -> None:
    samples = _samples(tmp_path, 4)
    _fit(tmp_path, _dataset(samples))
    files = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "features").iterdir()}
    assert len(files) == 4
    _fit(tmp_path, _dataset(samples[:3]))
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "features").iterdir()}
    assert len(kept) == 3
    assert kept.items() <= files.items()


def test_fit_damaged_features_are_computed_anew(tmp_path: Path) -> None:
    dataset = _dataset(_samples(tmp_path, 3))
    _fit(tmp_path, dataset)
    file = next((tmp_path / "features").iterdir())
    file.write_bytes(file.read_bytes()[:100])
    _fit(tmp_path, dataset)
    assert load_file(file)


def test_fit_image_that_vanished_is_left_out(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 4)
    samples[0].image.unlink()
    assert set(_fit(tmp_path, _dataset(samples)).out_of_fold) == {s.key for s in samples[1:]}


def test_fit_only_one_image_can_be_read_is_refused(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 3)
    for sample in samples[1:]:
        sample.image.unlink()
    with pytest.raises(Refused) as refused:
        _fit(tmp_path, _dataset(samples))
    assert refused.value.reason.code == Code.TOO_FEW_IMAGES


def test_fit_folder_of_features_cannot_be_written_goes_on_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = _dataset(_samples(tmp_path, 3))
    (tmp_path / "features").write_text("a file stands where the folder should be")
    assert _fit(tmp_path, dataset).verdict.promote
    assert "features are computed again next time" in caplog.text


def test_fit_more_images_than_it_takes_spreads_its_choice(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 2)
    many = [replace(samples[n % 2], key=f"{n}-image") for n in range(MOST_IMAGES + 20)]
    outcome = _fit(tmp_path, _dataset(many))
    assert len(outcome.out_of_fold) == MOST_IMAGES
    assert {"0-image", f"{MOST_IMAGES + 19}-image"} <= set(outcome.out_of_fold)


def test_fit_after_an_earlier_head_is_compared_with_it_on_images_it_had_not_seen(
    tmp_path: Path,
) -> None:
    samples = _samples(tmp_path, 8)
    first = _fit(tmp_path, _dataset(samples[:4]))
    live = Live("v1-live", first.detector, first.out_of_fold)
    assert live.is_live_head
    outcome = _fit(tmp_path, _dataset(samples), live)
    assert outcome.comparison is not None
    assert outcome.verdict.promote == (outcome.comparison.high >= 0)


def test_with_labels_moves_the_rows_of_labels_and_of_the_background() -> None:
    architecture = CellDetector()
    before = architecture.build(2)
    after = architecture.with_labels(before, ("a", "b"), ("c", "b", "a"))
    old, new = (m.state_dict()["label.weight"] for m in (before, after))
    for was, becomes in ((0, 0), (1, 3), (2, 2)):
        assert torch.equal(old[was], new[becomes])
    assert not torch.equal(new[1], old[1])
    assert torch.equal(
        before.state_dict()["distance.weight"], after.state_dict()["distance.weight"]
    )


def test_losses_of_a_perfect_image_fall_with_training() -> None:
    torch.manual_seed(0)
    architecture = CellDetector()
    module = architecture.build(1).train()
    architecture.freeze_statistics(module)
    images = [torch.rand(3, 64, 96)]
    targets = [Target(torch.tensor([[20.0, 10, 70, 50]]), torch.tensor([0]))]
    optimizer = torch.optim.SGD(architecture.parameter_groups(module).head, lr=0.01)
    losses = []
    for _ in range(20):
        loss = torch.stack(list(architecture.losses(module, images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert architecture.parameter_groups(module).trunk == []


def test_cell_targets_small_box_within_a_large_one_keeps_its_cell() -> None:
    boxes = torch.tensor([[0.0, 0, 64, 64], [36.0, 36, 44, 44]])
    wanted = cell_targets(Target(boxes, torch.tensor([0, 1])), 8, 8)
    assert set(wanted.labels.tolist()) == {0, 1, 2}
    assert wanted.weights[wanted.labels == 2].sum() == pytest.approx(1.0)


def test_cell_targets_box_outside_of_every_centre_gets_the_nearest_cell() -> None:
    wanted = cell_targets(Target(torch.tensor([[63.0, 20, 64, 30]]), torch.tensor([0])), 8, 8)
    assert int((wanted.labels == 1).sum()) >= 1


def test_detect_strip_and_square_in_one_batch_stay_within_their_images() -> None:
    architecture = CellDetector()
    module = architecture.build(1).eval()
    with torch.inference_mode():
        found = architecture.detect(module, [torch.rand(3, 40, 300), torch.rand(3, 90, 90)], SIZE)
    for one, (height, width) in zip(found, [(40, 300), (90, 90)], strict=True):
        assert one.embedding is not None
        assert bool((one.boxes >= 0).all())
        assert bool((one.boxes <= torch.tensor([width, height] * 2) + 1e-3).all())


@pytest.mark.parametrize("preset", [LITE.architecture, CellDetector()])
def test_pretrained_from_the_package_is_the_same_trunk(preset: CellDetector) -> None:
    module, loaded = preset.pretrained(("a",), "auto")
    assert loaded.kind == "backbone"
    state = module.state_dict()
    stem = next(v for k, v in state.items() if k.endswith("conv_stem.weight"))
    # The first stage is frozen in both, so that its normalisation is folded into it.
    expected = efficientnet_lite.packaged_state(1)["conv_stem.weight"]
    torch.testing.assert_close(stem, expected)


def test_packaged_state_folded_stages_compute_what_the_plain_ones_do() -> None:
    image = torch.rand(1, 3, 64, 64)
    outputs = []
    for frozen in (0, 3, 7):
        trunk = efficientnet_lite.EfficientNetLite(frozen).eval()
        trunk.load_state_dict(efficientnet_lite.packaged_state(frozen))
        with torch.inference_mode():
            outputs.append(trunk(image))
    for other in outputs[1:]:
        for stride, features in outputs[0].items():
            torch.testing.assert_close(other[stride], features, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_packaged_state_without_package_or_with_damaged_file_says_what_to_do(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "no_such_package"
    if content is not None:
        package = "damaged_weights"
        (tmp_path / package / "models").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("")
        (tmp_path / package / "models" / "efficientnet-lite0-1.pth").write_bytes(content)
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(efficientnet_lite, "_PACKAGE", package)
    with pytest.raises(WeightsError, match=r"efficientnet-lite0|cannot be read"):
        efficientnet_lite.packaged_state(7)


def test_pretrained_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"other\.pth: its 1 entries do not fit"):
        CellDetector().pretrained(("a",), str(file))


def test_is_live_head_card_of_an_earlier_release_was_trained() -> None:
    assert is_live_head({"kind": JobKind.LIVE_HEAD})
    assert not is_live_head({"kind": JobKind.TRAIN})
    assert not is_live_head({})
