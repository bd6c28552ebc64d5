"""Check the contract of detector architectures on torchvision's networks and on another one."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn

from ml_backend import extensions
from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.architectures.faster_rcnn import (
    faster_rcnn_mobilenet,
    faster_rcnn_resnet50,
)
from ml_backend.detection.architectures.fcos import fcos_shufflenet
from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import Preset, preset_named
from ml_backend.detection.training import train
from ml_backend.detection.types import Sample
from ml_backend.settings import load_settings
from tests.conftest import ROOT

CPU = torch.device("cpu")
ABC = ("a", "b", "c")


def _retinanet(outputs: int) -> nn.Module:
    module: nn.Module = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=outputs
    )
    return module


FASTER_RCNN_ROWS = {
    "roi_heads.box_predictor.cls_score": 1,
    "roi_heads.box_predictor.bbox_pred": 4,
}
"""Modules with rows of outputs, and the rows of each output."""
OLD_TO_NEW = [
    (ABC, ("c", "a", "b")),
    (ABC, ("a", "b", "x")),
    (ABC, ("x", "y", "z")),
    (("a", "b"), ("b", "a")),
    (("a", "b", "c", "d"), ("d", "c", "b", "a")),
    (ABC, ("b", "new", "a", "c", "e")),
    (ABC, ("c",)),
]
"""Reordered, renamed in part and in whole, reordered with 2 and 4, extended, and reduced."""


def _assert_rows_follow_labels(
    before: nn.Module,
    after: nn.Module,
    old: Sequence[str],
    new: Sequence[str],
    rows_of: Callable[[Tensor, int, int], Tensor],
    heads: Sequence[str],
) -> None:
    """Check that the rows of each label moved with it, and that everything else is equal."""
    was, now = before.state_dict(), after.state_dict()
    assert was.keys() == now.keys()
    for name, tensor in now.items():
        if not name.startswith(tuple(f"{head}." for head in heads)):
            assert torch.equal(tensor, was[name]), f"{name} is not kept"
            continue
        assert torch.equal(rows_of(tensor, 0, len(new) + 1), rows_of(was[name], 0, len(old) + 1)), (
            f"the background of {name} is not kept"
        )
        for number, label in enumerate(new):
            row = rows_of(tensor, number + 1, len(new) + 1)
            if label in old:
                source = rows_of(was[name], old.index(label) + 1, len(old) + 1)
                assert torch.equal(row, source), f"{label} of {name}"
            elif name.endswith("weight"):
                others = [rows_of(was[name], i, len(old) + 1) for i in range(len(old) + 1)]
                assert not any(torch.equal(row, other) for other in others), f"{label} of {name}"


@pytest.mark.parametrize(("old", "new"), OLD_TO_NEW)
def test_with_labels_faster_rcnn_keeps_rows_of_each_label_and_the_rpn(
    old: tuple[str, ...], new: tuple[str, ...]
) -> None:
    architecture = TorchvisionDetector(faster_rcnn_mobilenet)
    before = architecture.build(len(old))
    after = architecture.with_labels(before, old, new)

    def rows_of(tensor: Tensor, output: int, outputs: int) -> Tensor:
        each = tensor.shape[0] // outputs
        return tensor[output * each : (output + 1) * each]

    _assert_rows_follow_labels(before, after, old, new, rows_of, list(FASTER_RCNN_ROWS))


@pytest.mark.parametrize("labels", [2, 3])
def test_with_labels_resnet_with_as_many_outputs_as_anchors_keeps_the_rpn(labels: int) -> None:
    # Its RPN has 3 anchors: 3 rows of objectness and 12 of boxes, as 2 or 3 labels have.
    architecture = TorchvisionDetector(faster_rcnn_resnet50)
    old = ABC[:labels]
    before = architecture.build(labels)
    after = architecture.with_labels(before, old, old[::-1])
    for name, tensor in before.get_submodule("rpn").state_dict().items():
        assert torch.equal(tensor, after.get_submodule("rpn").state_dict()[name]), name


@pytest.mark.parametrize(("old", "new"), OLD_TO_NEW)
def test_with_labels_fcos_keeps_rows_of_each_label(
    old: tuple[str, ...], new: tuple[str, ...]
) -> None:
    architecture = TorchvisionDetector(fcos_shufflenet)
    before = architecture.build(len(old))
    after = architecture.with_labels(before, old, new)
    _assert_rows_follow_labels(
        before,
        after,
        old,
        new,
        lambda tensor, output, outputs: tensor[output],
        ["head.classification_head.cls_logits"],
    )


def test_with_labels_retinanet_keeps_rows_of_each_anchor() -> None:
    architecture = TorchvisionDetector(_retinanet)
    before = architecture.build(3)
    after = architecture.with_labels(before, ABC, ("c", "x", "a", "b"))
    _assert_rows_follow_labels(
        before,
        after,
        ABC,
        ("c", "x", "a", "b"),
        # Channels are viewed as [anchors, outputs].
        lambda tensor, output, outputs: tensor[output::outputs],
        ["head.classification_head.cls_logits"],
    )


class _ByTheProtocol(nn.Module):
    """Follow torchvision's documented protocol alone: this network has no `transform`."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(outputs))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        assert all(max(image.shape) <= 96 for image in images)
        if self.training:
            assert targets is not None
            assert all(set(target) == {"boxes", "labels"} for target in targets)
            return {"loss": self.weight.square().sum()}
        return [
            {
                # The whole image, of which the background is as sure as label 0.
                "boxes": torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]] * 2),
                "scores": torch.tensor([0.9, 0.9]),
                "labels": torch.tensor([0, 1]),
            }
            for image in images
        ]


PLAIN = Preset(
    name="plain",
    architecture=TorchvisionDetector(_ByTheProtocol),
    min_size=64,
    max_size=96,
    learning_rate=1e-3,
    batch_size=2,
    predict_batch=4,
    steps=3,
    epochs=0,
)


def _samples(folder: Path, count: int) -> list[Sample]:
    samples = []
    for image in generate(count, seed=0, width=128, height=96, most=2):
        path = folder / image.name
        path.write_bytes(image.encoded())
        labels = np.array([SHAPES.index(name) % 3 for name in image.labels], np.int64)
        samples.append(Sample(image.name, path, image.boxes, labels))
    return samples


def test_train_module_without_transform_trains_and_predicts(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 4)
    result = train(PLAIN, ABC, samples, weights="none", device=CPU, threads=1, budget_seconds=60)
    assert result.steps == 3
    (found,) = result.detector.predict([np.zeros((200, 300, 3), np.uint8)])
    assert found.boxes.tolist() == [[0, 0, 300, 200]]
    assert found.labels.tolist() == [0]


def test_readme_example_of_a_preset_is_loaded_trained_and_saved(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## Extend it")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "my_module.py").write_text(example)
    script = """
import dataclasses, sys, torch
from pathlib import Path
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import check, preset_named
cpu = torch.device("cpu")
check("my_module:my_preset", "none", cpu)
preset = preset_named("my_module:my_preset", cpu)
detector = Detector.pretrained(preset, ("a", "b"), "none", cpu).with_labels(("b", "c"))
detector.save(Path(sys.argv[1]))
print(Detector.load(Path(sys.argv[1]), cpu).preset.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "mine", done.stderr


def test_preset_of_an_entry_point_is_a_setting_and_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = EntryPoint("plain", "tests.test_architectures:PLAIN", "ml_backend.presets")
    monkeypatch.setattr(
        extensions,
        "entry_points",
        lambda group: [point] if group == "ml_backend.presets" else [],
    )
    # The names are read once for each process.
    monkeypatch.setattr(
        extensions.PRESETS, "paths", {**extensions.PRESETS.paths, point.name: point.value}
    )
    assert load_settings({"ML_BACKEND_PRESET": "plain"}).preset == "plain"
    assert preset_named("plain", CPU) == PLAIN
    assert preset_named("plain", CPU).reference == "plain"


def test_shrink_and_perturb_trunk_is_kept_and_head_is_halved() -> None:
    architecture = TorchvisionDetector(fcos_shufflenet)
    module = architecture.build(2)
    groups = architecture.parameter_groups(module)
    trunk = [p.detach().clone() for p in groups.trunk]
    head = [p.detach().clone() for p in groups.head]
    architecture.shrink_and_perturb(module, noise=0.0)
    assert len(trunk) > 50
    assert all(torch.equal(a, b) for a, b in zip(trunk, groups.trunk, strict=True))
    weights = [(a, b) for a, b in zip(head, groups.head, strict=True) if a.ndim > 1]
    assert weights
    assert all(torch.equal(a / 2, b) for a, b in weights)


def test_pretrained_labels_of_coco_start_from_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = preset_named("small", CPU)
    known = preset.architecture.published_labels
    assert known is not None
    state = preset.architecture.build(len(known)).state_dict()
    score = "roi_heads.box_predictor.cls_score.bias"
    state[score] = torch.arange(float(len(known) + 1))
    from torchvision.models import WeightsEnum

    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: dict(state))
    detector = Detector.pretrained(preset, ("mine", "car"), "auto", CPU)
    assert detector.weights.kind == "coco"
    bias = detector.module.state_dict()[score]
    assert bias[[0, 2]].tolist() == [0, known.index("car") + 1]
