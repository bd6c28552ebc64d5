"""Build, save and load detectors, change their labels, and fill them with weights."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ml_backend.demo.shapes import generate
from ml_backend.detection.architectures.base import Target, WeightsError
from ml_backend.detection.architectures.fcos import fcos_shufflenet
from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.detector import CorruptDetector, Detector
from ml_backend.detection.device import DeviceError, resolve_device
from ml_backend.detection.presets import PresetError, check, preset_named
from ml_backend.detection.presets.tiny import PRESET as TINY
from ml_backend.extensions import PRESETS
from ml_backend.remedies import with_remedy
from ml_backend.serving.own_device import own_device

CPU = torch.device("cpu")
LABELS = ("car", "person", "valve")
MINE = replace(TINY, name="mine", min_size=96, max_size=160)
"""A preset outside of this program, which its import path names."""
SLASHED = replace(MINE, name="my/own")


def _unbuilt(outputs: int) -> nn.Module:
    raise RuntimeError("no such layer\nand more")


UNBUILT = replace(MINE, architecture=TorchvisionDetector(_unbuilt))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def _pictures() -> list[Image.Image]:
    return [image.image for image in generate(2, seed=1, width=160, height=120)]


def _detector(labels: tuple[str, ...] = LABELS) -> Detector:
    detector = Detector.pretrained(TINY, labels, "none", CPU)
    # Untrained, it would find each class with the same tiny confidence everywhere.
    with torch.no_grad():
        for name, parameter in detector.module.named_parameters():
            if "cls_logits.weight" in name:
                parameter.normal_(0, 0.5)
    return detector


def test_load_saved_detector_finds_the_same_boxes(tmp_path: Path) -> None:
    detector = _detector()
    detector.thresholds = {"car": 0.25}
    detector.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    loaded = Detector.load(tmp_path, CPU)
    assert (loaded.labels, loaded.thresholds) == (LABELS, {"car": 0.25})
    for before, after in zip(
        detector.predict(_pictures()), loaded.predict(_pictures()), strict=True
    ):
        assert len(before) > 0
        assert np.array_equal(before.boxes, after.boxes)
        assert np.array_equal(before.scores, after.scores)
        assert np.array_equal(before.labels, after.labels)


@pytest.mark.parametrize("harm", ["truncated", "missing", "no card", "other preset", "pickle"])
def test_load_damaged_detector_raises_error_with_folder(tmp_path: Path, harm: str) -> None:
    _detector().save(tmp_path)
    weights, card = tmp_path / "model.safetensors", tmp_path / "detector.json"
    if harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif harm == "missing":
        weights.unlink()
    elif harm == "no card":
        card.write_text("{")
    elif harm == "other preset":
        card.write_text(card.read_text().replace('"tiny"', '"small"'))
    else:
        weights.write_bytes(pickle.dumps({"a": torch.zeros(1)}))
    with pytest.raises(CorruptDetector, match=str(tmp_path)):
        Detector.load(tmp_path, CPU)


def test_predict_any_size_boxes_are_in_pixels_of_the_image_and_sorted() -> None:
    (found,) = _detector().predict([Image.new("RGB", (500, 90), "grey")], floor=0.0)
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes >= 0).all()
    assert found.boxes[:, [0, 2]].max() <= 500
    assert found.boxes[:, [1, 3]].max() <= 90
    assert set(found.labels.tolist()) <= {0, 1, 2}


def _logits(detector: Detector) -> dict[str, torch.Tensor]:
    """Compute the raw class outputs of one image by label, before any threshold or suppression."""
    features = detector.module.backbone(torch.full((1, 3, 96, 96), 0.3))  # type: ignore[operator]
    with torch.inference_mode():
        out = detector.module.head(list(features.values()))["cls_logits"]  # type: ignore[operator]
    return {label: out[..., i + 1] for i, label in enumerate(detector.labels)}


def test_with_labels_other_set_of_labels_keeps_logits_of_common_labels() -> None:
    before = _detector()
    after = before.with_labels(("valve", "new", "car"))
    assert after.labels == ("valve", "new", "car")
    old, new = _logits(before), _logits(after)
    for label in ("valve", "car"):
        assert torch.allclose(old[label], new[label], atol=1e-6)
    assert not any(torch.allclose(new["new"], logits) for logits in old.values())
    assert _logits(after.with_labels(("car",))).keys() == {"car"}


@pytest.mark.parametrize("seed", range(5))
def test_fcos_shufflenet_new_module_has_a_gradient_on_every_side(seed: int) -> None:
    torch.manual_seed(seed)
    head = fcos_shufflenet(3).get_submodule("head.regression_head")
    distances, _ = head([torch.rand(2, 64, 12, 16)])
    # No gradient reaches a distance of 0.
    assert (distances > 0).float().mean(dim=(0, 1)).min() > 0.9


@pytest.mark.parametrize("name", list(PRESETS))
def test_architecture_of_each_preset_computes_losses_and_detections(name: str) -> None:
    preset = replace(preset_named(name, CPU), min_size=96, max_size=160)
    module = preset.architecture.build(3).train()
    images = [torch.rand(3, 96, 128), torch.rand(3, 112, 96)]
    targets = [
        Target(torch.tensor([[10.0, 10.0, 60.0, 50.0]]), torch.tensor([1])),
        Target(torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64)),
    ]
    losses = preset.architecture.losses(module, images, targets)
    loss = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(loss)
    loss.backward()  # type: ignore[no-untyped-call]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    with torch.inference_mode():
        found = preset.architecture.detect(module.eval(), images, preset.input_size)
    assert [len(f.boxes) == len(f.scores) == len(f.labels) for f in found] == [True, True]


def test_preset_named_import_path_or_unknown_name_is_loaded_or_named_in_error() -> None:
    assert preset_named("tests.test_detector:MINE", CPU) == MINE
    assert preset_named("auto", CPU).name == "lite"
    with pytest.raises(PresetError, match="auto, lite, tiny, small, accurate, or an import path"):
        preset_named("huge", CPU)
    with pytest.raises(PresetError, match="cannot be imported"):
        preset_named("tests.nowhere:MINE", CPU)
    with pytest.raises(PresetError, match="is not a Preset"):
        preset_named("tests.test_detector:LABELS", CPU)


def test_load_detector_of_imported_preset_finds_preset_again(tmp_path: Path) -> None:
    preset = preset_named("tests.test_detector:MINE", CPU)
    assert preset.name == "mine"
    Detector.pretrained(preset, LABELS, "none", CPU).save(tmp_path)
    loaded = Detector.load(tmp_path, CPU)
    assert (loaded.preset.name, loaded.preset.min_size) == ("mine", 96)
    # Saved once more, as by a training that began from it.
    loaded.with_labels(LABELS[:1]).save(tmp_path)
    assert Detector.load(tmp_path, CPU).preset == MINE


def test_check_usable_preset_and_weights_raises_nothing(tmp_path: Path) -> None:
    for preset in ("auto", "tests.test_detector:MINE"):
        check(preset, "auto", CPU)
    trunk = tmp_path / "trunk.pth"
    torch.save(fcos_shufflenet(2).backbone.body.state_dict(), trunk)  # type: ignore[union-attr]
    check("tiny", str(trunk), CPU)


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ("foo:bar", "cannot be imported .*PYTHONPATH"),
        ("huge", "there is no preset 'huge'"),
        ("tests.test_detector:SLASHED", "cannot be part of a file name"),
        ("tests.test_detector:UNBUILT", "cannot be built: no such layer"),
    ],
)
def test_check_wrong_preset_raises_error_that_names_setting(preset: str, says: str) -> None:
    with pytest.raises(PresetError) as raised:
        check(preset, "none", CPU)
    assert re.fullmatch(f"ML_BACKEND_PRESET: .*{says}.*", with_remedy(raised.value))


@pytest.mark.parametrize("content", [b"garbage", b"", "tensor", "other", None])
def test_check_unusable_weights_raise_error_that_names_setting_and_file(
    tmp_path: Path, content: bytes | str | None
) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(torch.zeros(3) if content == "tensor" else {"model": {}, 7: 1}, file)
    with pytest.raises(WeightsError) as raised:
        check("tiny", str(file), CPU)
    assert re.fullmatch(f"ML_BACKEND_WEIGHTS: .*{file}.*", with_remedy(raised.value))
    assert "weights_only" not in str(raised.value)


def test_pretrained_file_of_trunk_fills_trunk(tmp_path: Path) -> None:
    trunk = fcos_shufflenet(2).backbone.body  # type: ignore[union-attr]
    assert isinstance(trunk, nn.Module)
    file = tmp_path / "trunk.pth"
    torch.save(trunk.state_dict(), file)
    detector = Detector.pretrained(TINY, LABELS, str(file), CPU)
    assert detector.weights.kind == "file"
    assert "trunk.pth" in detector.weights.detail
    filled = detector.module.backbone.body.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(filled[k], v) for k, v in trunk.state_dict().items())


def test_predict_image_far_too_large_boxes_are_in_pixels_of_the_image() -> None:
    detector = Detector.pretrained(TINY, LABELS, "none", CPU)
    small = generate(1, seed=3, width=900, height=600)[0].image
    large = small.resize((2700, 1800), Image.Resampling.NEAREST)
    (of_small,), (of_large,) = detector.predict([small]), detector.predict([large])
    assert len(of_small) > 0
    assert of_large.boxes == pytest.approx(of_small.boxes * 3, abs=0.1)
    assert of_large.scores == pytest.approx(of_small.scores, abs=1e-4)
    assert of_large.size == (2700, 1800)
    # The network gets no more of it than it looks at.
    assert detector.prepare(large).pixels.shape == (600, 900, 3)
    for strip in (Image.new("RGB", (1, 50_000)), Image.new("RGB", (50_000, 1))):
        (found,) = detector.predict([strip])
        assert found.size == strip.size
        assert (found.boxes <= [*strip.size, *strip.size]).all()


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this pickle ran",))


def test_pretrained_file_that_does_not_fit_or_runs_code_raises_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="none of its 1 entries fits"):
        Detector.pretrained(TINY, LABELS, str(other), CPU)
    code = tmp_path / "code.pth"
    code.write_bytes(pickle.dumps(_Code()))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        Detector.pretrained(TINY, LABELS, str(code), CPU)
    assert "this pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "lite"])
def test_pretrained_failed_download_starts_without_weights_and_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    detector = Detector.pretrained(preset_named(name, CPU), LABELS, "auto", CPU)
    assert detector.weights.kind == "none"
    assert "cannot be downloaded" in detector.weights.detail
    assert Detector.coco(preset_named(name, CPU), CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_resolve_device_missing_gpu_raises_error_that_names_setting() -> None:
    assert resolve_device("cpu") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError) as raised:
            resolve_device(name)
        assert "ML_BACKEND_DEVICE=cpu" in with_remedy(raised.value)


def test_own_device_taken_gpus_raise_error_that_names_setting(tmp_path: Path) -> None:
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    # Two owners within this process stand for two processes: the locks are the files'.
    assert own_device(gpus, tmp_path) == gpus[0]
    assert own_device(gpus, tmp_path) == gpus[1]
    with pytest.raises(DeviceError) as raised:
        own_device(gpus, tmp_path)
    assert "WORKERS=2" in with_remedy(raised.value)
    assert own_device([CPU], tmp_path) == CPU
    assert own_device([CPU], tmp_path) == CPU
