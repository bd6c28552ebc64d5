"""A detector for the first few images: every cell of the finest features predicts one box.

The features of three strides are put together at stride 8. A linear layer tells the label of a
cell, another one the logarithms of the distances to the sides of its box. `cells_fit` fits both to
annotated images within seconds; the trunk stays as it was pretrained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss

from ml_backend.detection.architectures.base import (
    Architecture,
    Found,
    InputSize,
    LoadedWeights,
    ParameterGroups,
    Target,
    WeightsError,
)
from ml_backend.detection.architectures.efficientnet_lite import (
    CHANNELS,
    MEAN,
    SPREAD,
    STAGES,
    STRIDES,
    EfficientNetLite,
    packaged_state,
)
from ml_backend.detection.architectures.state_files import fitting, read_state
from ml_backend.detection.embedding import embeddings_of

STRIDE = STRIDES[0]
CENTRE = 0.3
"""Share of a box, around its centre, whose cells are to find it."""
BACKGROUND = 0.05
"""Weight of a cell of the background; the cells of one box weigh 1 together."""
SCORE = 0.01
"""Confidence down to which boxes are found; the thresholds of a detector decide later."""
OVERLAP = 0.35
"""IoU from which the less confident of two boxes of a label is left out."""
ALIKE = 0.65
"""IoU from which a box is averaged with the one that stays, by the square of the confidence."""
_CANDIDATES = 1000
_MOST = 100
_CONTEXT = 5
"""Cells, horizontally and vertically, whose mean surrounds a cell."""
_FEATURES = sum(CHANNELS) + CHANNELS[0]


class CellNet(nn.Module):
    """The network.

    Args:
        labels: number of labels.
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.trunk = EfficientNetLite(STAGES)
        self.register_buffer("mean", torch.zeros(_FEATURES))
        self.register_buffer("spread", torch.ones(_FEATURES))
        # Between the least and the greatest distances that were learned, in logarithms.
        self.register_buffer("least", torch.full((4,), -3.0))
        self.register_buffer("greatest", torch.full((4,), 5.0))
        self.label = nn.Conv2d(_FEATURES, labels + 1, 1)
        self.distance = nn.Conv2d(_FEATURES, 4, 1)
        for layer in (self.label, self.distance):
            nn.init.normal_(layer.weight, std=0.001)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts for every cell.

        Args:
            images: float32 `[B, 3, H, W]`, RGB in `[0, 1]`; `H` and `W` multiples of 32.

        Returns:
            Logits `[B, 1 + C, H / 8, W / 8]`, the background first, and logarithms of the
            distances to the left, upper, right and lower side, in strides, `[B, 4, H / 8, W / 8]`.
        """
        return self.head(self.features(images))

    def features(self, images: Tensor) -> list[Tensor]:
        """Computes the features of images, one `[B, C, H / stride, W / stride]` a stride."""
        return list(self.trunk((images - MEAN) / SPREAD).values())

    def head(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Predicts from the features of images, as `forward` does from the images."""
        mean, spread = self.get_buffer("mean"), self.get_buffer("spread")
        x = (joined(features) - mean[:, None, None]) / spread[:, None, None]
        least, greatest = self.get_buffer("least"), self.get_buffer("greatest")
        return self.label(x), self.distance(x).clamp(least[:, None, None], greatest[:, None, None])


def joined(features: Sequence[Tensor]) -> Tensor:
    """Puts the features of all strides, and of the surroundings, together at stride 8."""
    fine, *coarse = features
    size = fine.shape[-2:]
    around = functional.avg_pool2d(fine, _CONTEXT, 1, _CONTEXT // 2, count_include_pad=False)
    larger = [functional.interpolate(f, size, mode="bilinear") for f in coarse]
    return torch.cat([fine, around, *larger], dim=1)


@dataclass(frozen=True, slots=True)
class CellTargets:
    """What the cells of one image should predict.

    Attributes:
        labels: int64 `[N]`, 0 for the background, else 1 + label.
        weights: float32 `[N]`, of a cell; 0 where a cell may predict anything.
        boxes: float32 `[N, 4]`, `x1, y1, x2, y2` in pixels; of cells of a box.
    """

    labels: Tensor
    weights: Tensor
    boxes: Tensor


def cell_targets(target: Target, height: int, width: int) -> CellTargets:
    """Decides what the cells of an image should predict.

    Cells near the centre of a box find it, the smaller box where two claim a cell; the other cells
    of a box may predict anything.

    Args:
        target: the objects of the image.
        height: cells vertically,
        width: and horizontally.
    """
    centres = cell_centres(height, width, target.boxes.device)
    labels = torch.zeros(len(centres), dtype=torch.int64, device=centres.device)
    weights = torch.full((len(centres),), BACKGROUND, device=centres.device)
    boxes = torch.zeros(len(centres), 4, device=centres.device)
    if not len(target.boxes):
        return CellTargets(labels, weights, boxes)
    x, y = centres[:, :1], centres[:, 1:]
    x1, y1, x2, y2 = target.boxes.unbind(1)
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    reach_x = (CENTRE * (x2 - x1) / 2).clamp(min=0.71 * STRIDE)
    reach_y = (CENTRE * (y2 - y1) / 2).clamp(min=0.71 * STRIDE)
    off_x, off_y = (x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs()
    near = (off_x < reach_x) & (off_y < reach_y)
    # A box at the image's edge may have its centre outside of all cells.
    lost = ~near.any(dim=0)
    if lost.any():
        nearest = (off_x**2 + off_y**2).argmin(dim=0)
        near[nearest[lost], lost.nonzero()[:, 0]] = True
    area = ((x2 - x1) * (y2 - y1)).expand(len(centres), -1)
    smallest, owner = torch.where(near, area, torch.inf).min(dim=1)
    found = torch.isfinite(smallest)
    labels[found] = target.labels[owner[found]] + 1
    boxes[found] = target.boxes[owner[found]]
    cells = torch.bincount(owner[found], minlength=len(target.boxes))
    weights[inside.any(dim=1)] = 0.0
    weights[found] = 1.0 / cells[owner[found]].float()
    return CellTargets(labels, weights, boxes)


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Lists the centres of cells, row by row: float32 `[height * width, 2]`, x and y in pixels."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return (torch.stack([x, y], dim=-1).reshape(-1, 2).float() + 0.5) * STRIDE


def boxes_of(centres: Tensor, distances: Tensor) -> Tensor:
    """Computes boxes, `[N, 4]` in pixels, from logarithms of distances in strides, `[N, 4]`."""
    reach = distances.exp() * STRIDE
    return torch.cat([centres - reach[:, :2], centres + reach[:, 2:]], dim=1)


class CellDetector(Architecture):
    """The family of such networks."""

    def build(self, labels: int) -> CellNet:
        """Makes a network for a number of labels, without pretrained weights."""
        return CellNet(labels)

    def pretrained(self, labels: Sequence[str], weights: str) -> tuple[nn.Module, LoadedWeights]:
        """Makes a network that starts from pretrained weights, as the base class says."""
        module = self.build(len(labels))
        if weights == "auto":
            module.trunk.load_state_dict(packaged_state(STAGES))
            return module, LoadedWeights("backbone", "EfficientNet-Lite0, from a package")
        if weights == "none":
            return module, LoadedWeights("none", "no pretrained weights, as set")
        file = Path(weights)
        state = read_state(file)
        for part in (module, module.trunk):
            fits = fitting(part, state)
            if len(fits) == len(part.state_dict()):
                part.load_state_dict(fits)
                return module, LoadedWeights("file", f"{len(fits)} tensors of {file.name}")
        raise WeightsError(
            f"{file}: its {len(state)} entries do not fit the preset: give weights of its trunk "
            "or of the whole detector"
        )

    def losses(
        self, module: nn.Module, images: Sequence[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch, as the base class says."""
        logits, distances = module(torch.stack(list(images)))
        height, width = logits.shape[-2:]
        centres = cell_centres(height, width, logits.device)
        wanted = [cell_targets(target, height, width) for target in targets]
        labels = torch.stack([w.labels for w in wanted])
        weights = torch.stack([w.weights for w in wanted])
        boxes = torch.stack([w.boxes for w in wanted])
        total = max(1.0, sum(len(t.boxes) for t in targets))
        logits = logits.flatten(2).float()
        of_label = functional.cross_entropy(logits, labels, reduction="none") * weights
        found = labels > 0
        image, cell = found.nonzero(as_tuple=True)
        predicted = boxes_of(centres[cell], distances.flatten(2).float()[image, :, cell])
        of_box = generalized_box_iou_loss(predicted, boxes[found]) * weights[found]
        return {"label": of_label.sum() / total, "box": of_box.sum() / total}

    def detect(self, module: nn.Module, images: Sequence[Tensor], size: InputSize) -> list[Found]:
        """Finds objects, as the base class says."""
        assert isinstance(module, CellNet)
        resized = [resized_to(image, size) for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in resized]
        height = max(h for h, _ in sizes)
        width = max(w for _, w in sizes)
        batch = torch.stack(
            [functional.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in resized]
        )
        with embeddings_of(module.trunk, sizes) as seen:
            logits, distances = module(batch.contiguous(memory_format=torch.channels_last))
        found = []
        for number, (image, (own_height, own_width)) in enumerate(zip(images, sizes, strict=True)):
            rows, columns = own_height // STRIDE, own_width // STRIDE
            ratios = [image.shape[-1] / own_width, image.shape[-2] / own_height]
            boxes, scores, labels = decoded(
                logits[number, :, :rows, :columns], distances[number, :, :rows, :columns]
            )
            found.append(
                Found(boxes * boxes.new_tensor(ratios * 2), scores, labels, seen.rows[number])
            )
        return found

    def parameter_groups(self, module: nn.Module) -> ParameterGroups:
        """Divides the parameters that learn into trunk and head."""
        assert isinstance(module, CellNet)
        of_trunk = {id(p) for p in module.trunk.parameters()}
        groups = ParameterGroups([], [])
        for parameter in module.parameters():
            if parameter.requires_grad:
                (groups.trunk if id(parameter) in of_trunk else groups.head).append(parameter)
        return groups

    def with_labels(self, module: nn.Module, old: Sequence[str], new: Sequence[str]) -> nn.Module:
        """Makes a network for other labels, as the base class says."""
        fresh = self.build(len(new))
        state, known = fresh.state_dict(), module.state_dict()
        rows = {"label.weight", "label.bias"}
        pairs = [(0, 0)] + [(old.index(x) + 1, i + 1) for i, x in enumerate(new) if x in old]
        for name, tensor in known.items():
            if name not in rows:
                state[name] = tensor
                continue
            state[name] = state[name].to(tensor.device)
            for was, becomes in pairs:
                state[name][becomes] = tensor[was]
        fresh.load_state_dict(state)
        return fresh


def decoded(logits: Tensor, distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reads the boxes of one image from what its cells predict.

    Args:
        logits: `[1 + C, h, w]`.
        distances: `[4, h, w]`.

    Returns:
        Boxes `[N, 4]` in pixels of the network's input and within it, scores `[N]` and labels
        `[N]`.
    """
    height, width = logits.shape[-2:]
    confidences = logits.flatten(1).float().softmax(dim=0)[1:].T
    boxes = boxes_of(cell_centres(height, width, logits.device), distances.flatten(1).float().T)
    most = min(_CANDIDATES, confidences.numel())
    scores, places = confidences.flatten().topk(most)
    enough = scores > SCORE
    scores, places = scores[enough], places[enough]
    labels = places % confidences.shape[1]
    boxes = boxes[places // confidences.shape[1]]
    kept = batched_nms(boxes, scores, labels, OVERLAP)[:_MOST]
    # A cell alone is less exact than its neighbours together.
    voices = (box_iou(boxes[kept], boxes) > ALIKE) * (labels[kept][:, None] == labels)
    weights = voices * scores.square()
    boxes = weights @ boxes / weights.sum(dim=1, keepdim=True)
    limits = boxes.new_tensor([width, height] * 2) * STRIDE
    return torch.minimum(boxes.clamp(min=0), limits), scores[kept], labels[kept]


def resized_to(image: Tensor, size: InputSize) -> Tensor:
    """Resizes an image to whole strides of 32, which keeps its shape nearly."""
    scale = size.scale(*image.shape[-2:])
    height, width = (max(32, 32 * round(side * scale / 32)) for side in image.shape[-2:])
    resized: Tensor = functional.interpolate(
        image[None], (height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]
    return resized
