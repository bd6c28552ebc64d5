"""Fits the linear layers of a `CellNet` to annotated images, within seconds on one core.

Labels by multinomial logistic regression (L-BFGS), logarithms of distances by ridge regression.
The constants were chosen on half of the images of two data sets; the README's figures are of the
other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ml_backend.detection.architectures.base import Target
from ml_backend.detection.architectures.cells import (
    STRIDE,
    CellNet,
    cell_centres,
    cell_targets,
    joined,
)

LABEL_PENALTY = 0.03
"""Weight of the squared coefficients of the labels, relative to the mean loss of a cell."""
DISTANCE_PENALTY = 100.0
"""The same for the distances, relative to the sum over boxes."""
BACKGROUND_CELLS = 8000
"""Cells of the background that are looked at; more say little and cost time."""
ITERATIONS = 25
_MARGIN = 0.3
"""Logarithm of the factor by which a distance may leave the range that was learned."""


@dataclass(frozen=True, slots=True)
class View:
    """The cells of one image, or of its mirror image, that there is something to learn from.

    Attributes:
        features: float32 `[N, F]`, not standardised.
        labels: int64 `[N]`, 0 for the background, else 1 + label.
        weights: float32 `[N]`.
        distances: float32 `[N, 4]`, logarithms of distances in strides; of cells of a box.
    """

    features: Tensor
    labels: Tensor
    weights: Tensor
    distances: Tensor


def view_of(features: Sequence[Tensor], target: Target) -> View:
    """Makes the view of an image.

    Args:
        features: of the image alone, by `CellNet.features`.
        target: the objects of the image, in pixels of the network's input.
    """
    cells = joined(features)[0]
    height, width = cells.shape[-2:]
    wanted = cell_targets(target, height, width)
    centres = cell_centres(height, width, cells.device)
    used = wanted.weights > 0
    centres, boxes = centres[used], wanted.boxes[used]
    reach = torch.cat([centres - boxes[:, :2], boxes[:, 2:] - centres], dim=1)
    return View(
        cells.flatten(1).T[used],
        wanted.labels[used],
        wanted.weights[used],
        reach.clamp(min=1.0).div(STRIDE).log(),
    )


def fit_head(module: CellNet, views: Sequence[View], *, seed: int = 0) -> None:
    """Fits the layers `label` and `distance` of a network, and how its features are standardised.

    Args:
        module: its labels are those of the views.
        views: at least one.
        seed: of the choice among the background's cells.
    """
    with torch.no_grad():
        data = _sampled(views, seed)
        mean, spread = data.features.mean(dim=0), data.features.std(dim=0) + 1e-3
        x = (data.features - mean) / spread
        labels = _fit_labels(x, data, module.label.out_channels)
        module.get_buffer("mean").copy_(mean)
        module.get_buffer("spread").copy_(spread)
        module.label.weight.copy_(labels[:, 1:, None, None])
        assert module.label.bias is not None and module.distance.bias is not None
        module.label.bias.copy_(labels[:, 0])
        found = data.labels > 0
        if found.any():
            distances = _fit_distances(x[found], data.distances[found], data.weights[found])
            module.distance.weight.copy_(distances[1:].T[..., None, None])
            module.distance.bias.copy_(distances[0])
            module.get_buffer("least").copy_(data.distances[found].amin(dim=0) - _MARGIN)
            module.get_buffer("greatest").copy_(data.distances[found].amax(dim=0) + _MARGIN)


def _sampled(views: Sequence[View], seed: int) -> View:
    """Puts views together, with some of the background's cells, which stand for all of them."""
    random = torch.Generator().manual_seed(seed)
    background = sum(int((view.labels == 0).sum()) for view in views)
    share = min(1.0, BACKGROUND_CELLS / max(1, background))
    parts = []
    for view in views:
        kept = (view.labels > 0) | (torch.rand(len(view.labels), generator=random) < share)
        weights = torch.where(view.labels > 0, view.weights, view.weights / share)
        parts.append((view.features[kept], view.labels[kept], weights[kept], view.distances[kept]))
    return View(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@torch.enable_grad()
def _fit_labels(x: Tensor, data: View, outputs: int) -> Tensor:
    """Answers coefficients `[outputs, 1 + F]`, the intercept first."""
    weights = data.weights / data.weights.sum()
    coefficients = torch.zeros(outputs, 1 + x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coefficients], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x @ coefficients[:, 1:].T + coefficients[:, 0]
        misfit = functional.cross_entropy(logits, data.labels, reduction="none") @ weights
        value: Tensor = misfit + LABEL_PENALTY * coefficients[:, 1:].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return coefficients.detach()


def _fit_distances(x: Tensor, distances: Tensor, weights: Tensor) -> Tensor:
    """Answers coefficients `[1 + F, 4]`, the intercept first."""
    x = torch.cat([torch.ones(len(x), 1), x], dim=1).double()
    penalty = torch.full((x.shape[1],), DISTANCE_PENALTY, dtype=torch.float64)
    penalty[0] = 1e-6
    weighted = x * weights[:, None]
    found: Tensor = torch.linalg.solve(
        weighted.T @ x + penalty.diag(), weighted.T @ distances.double()
    )
    return found.float()
