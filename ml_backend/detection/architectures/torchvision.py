"""Networks that follow torchvision's detection protocol, by torchvision or by anyone else.

In training mode such a module maps `(images, targets)` to a dict of losses, in evaluation mode
`(images)` to a list of dicts with `boxes`, `scores` and `labels` (documentation of
`torchvision.models.detection`). Output 0 is the background, output `i + 1` is label `i`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import WeightsEnum
from torchvision.models.detection.fcos import FCOSClassificationHead
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.models.detection.ssd import SSDClassificationHead
from torchvision.models.detection.ssdlite import SSDLiteClassificationHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ml_backend.detection.architectures.base import (
    Architecture,
    Found,
    InputSize,
    LoadedWeights,
    ParameterGroups,
    Target,
    WeightsError,
)
from ml_backend.detection.architectures.state_files import fitting, read_state
from ml_backend.detection.embedding import embeddings_of

_log = logging.getLogger(__name__)

_ANCHOR_MAJOR = (
    FCOSClassificationHead,
    RetinaNetClassificationHead,
    SSDClassificationHead,
    SSDLiteClassificationHead,
)
"""Heads whose output channels are viewed as `[anchors, outputs]`; elsewhere as `[outputs, k]`."""


@dataclass(frozen=True, slots=True)
class TorchvisionDetector(Architecture):
    """A family of networks in torchvision's protocol.

    Images reach the module resized, so it needs no `transform`; where it has torchvision's, that
    one normalises and batches, and no longer resizes.

    Attributes:
        build_module: makes the module for a number of outputs (labels and background), without
            weights.
        backbone: torchvision's weights of the trunk,
        coco: and of the whole detector, where there are any; both are downloaded once.
        packaged: reads weights of the trunk that an installed package carries, instead.
        trunk: path of the trunk within the module. A module without it trains at one learning
            rate and has no embeddings.
    """

    build_module: Callable[[int], nn.Module]
    backbone: WeightsEnum | None = None
    coco: WeightsEnum | None = None
    packaged: Callable[[], Mapping[str, Tensor]] | None = None
    trunk: str = "backbone.body"

    @property
    def published_labels(self) -> tuple[str, ...] | None:
        """Names of COCO's categories, where `coco` is given."""
        return None if self.coco is None else tuple(self.coco.meta["categories"][1:])

    def build(self, labels: int) -> nn.Module:
        """Makes a network for a number of labels, without pretrained weights."""
        module = self.build_module(labels + 1)
        _stop_resizing(module)
        return module

    def pretrained(self, labels: Sequence[str], weights: str) -> tuple[nn.Module, LoadedWeights]:
        """Makes a network that starts from pretrained weights, as the base class says."""
        known = self.published_labels
        if weights == "auto" and known is not None:
            donor = self.build(len(known))
            loaded = self._load_published(donor)
            if loaded.kind == "coco":
                return self.with_labels(donor, known, labels), loaded
            return self.build(len(labels)), loaded
        module = self.build(len(labels))
        if weights == "none":
            return module, LoadedWeights("none", "no pretrained weights, as set")
        if weights == "auto":
            return module, self._load_published(module)
        return module, self._load_file(module, Path(weights))

    def published(self) -> tuple[nn.Module, LoadedWeights] | None:
        """Makes COCO's detector; None where its weights cannot be had."""
        known = self.published_labels
        if known is None:
            return None
        module = self.build(len(known))
        loaded = self._load_published(module)
        return (module, loaded) if loaded.kind == "coco" else None

    def losses(
        self, module: nn.Module, images: Sequence[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch, as the base class says."""
        losses: dict[str, Tensor] = module(list(images), [_protocol(t) for t in targets])
        return losses

    def detect(self, module: nn.Module, images: Sequence[Tensor], size: InputSize) -> list[Found]:
        """Finds objects, as the base class says."""
        resized = [_resize(image, size) for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in resized]
        with embeddings_of(self._trunk(module), sizes) as seen:
            outputs: list[dict[str, Tensor]] = module(resized)
        found = []
        for number, (output, image, small) in enumerate(zip(outputs, images, resized, strict=True)):
            ratios = [image.shape[-1] / small.shape[-1], image.shape[-2] / small.shape[-2]]
            # Output 0 is the background, which no label names.
            keep = output["labels"] > 0
            found.append(
                Found(
                    output["boxes"][keep] * output["boxes"].new_tensor(ratios * 2),
                    output["scores"][keep],
                    output["labels"][keep] - 1,
                    seen.rows[number] if seen.rows else None,
                )
            )
        return found

    def parameter_groups(self, module: nn.Module) -> ParameterGroups:
        """Divides the parameters into trunk and head."""
        trunk = self._trunk(module)
        ids = {id(p) for p in trunk.parameters()} if trunk is not None else set()
        groups = ParameterGroups([], [])
        for parameter in module.parameters():
            if parameter.requires_grad:
                (groups.trunk if id(parameter) in ids else groups.head).append(parameter)
        return groups

    def with_labels(self, module: nn.Module, old: Sequence[str], new: Sequence[str]) -> nn.Module:
        """Makes a network for other labels, as the base class says.

        The tensors that hold rows of outputs are those whose shape depends on the number of
        outputs; a tensor of equal shape in another part, such as the RPN's, is never among them.
        """
        fresh = self.build(len(new))
        state, known = fresh.state_dict(), module.state_dict()
        rows = self._rows_per_output(fresh, len(new))
        kept = [(old.index(label), number) for number, label in enumerate(new) if label in old]
        for name, tensor in state.items():
            if name in rows:
                state[name] = _moved(known.get(name), tensor, rows[name], len(old), len(new), kept)
            elif name in known and known[name].shape == tensor.shape:
                state[name] = known[name]
            else:
                _log.warning("%s cannot be taken over to other labels: it starts anew", name)
        fresh.load_state_dict(state)
        return fresh

    def _rows_per_output(self, module: nn.Module, labels: int) -> dict[str, _Rows]:
        """Finds the tensors with rows of outputs, by building the network for one label more."""
        # Neither may change the random numbers that a training draws.
        with torch.random.fork_rng(devices=[]):
            larger = self.build(labels + 1).state_dict()
        heads = [
            f"{name}." for name, part in module.named_modules() if isinstance(part, _ANCHOR_MAJOR)
        ]
        return {
            name: _Rows(
                larger[name].shape[0] - tensor.shape[0],
                anchor_major=any(name.startswith(head) for head in heads),
            )
            for name, tensor in module.state_dict().items()
            if tensor.ndim > 0 and name in larger and larger[name].shape != tensor.shape
        }

    def _trunk(self, module: nn.Module) -> nn.Module | None:
        # A backbone without a feature pyramid is the trunk itself.
        for path in (self.trunk, self.trunk.rpartition(".")[0]):
            try:
                if path:
                    return module.get_submodule(path)
            except AttributeError:
                continue
        return None

    def _load_published(self, module: nn.Module) -> LoadedWeights:
        trunk = self._trunk(module)
        if self.packaged is not None and trunk is not None:
            trunk.load_state_dict(self.packaged())
            return LoadedWeights("backbone", f"{type(trunk).__name__}, from a package")
        kinds: tuple[tuple[Literal["coco", "backbone"], WeightsEnum | None], ...] = (
            ("coco", self.coco),
            ("backbone", self.backbone),
        )
        for kind, enum in kinds:
            if enum is None:
                continue
            try:
                state = enum.get_state_dict(progress=False, check_hash=True)
            except (URLError, OSError, RuntimeError) as error:
                detail = f"{enum} cannot be downloaded ({error})"
                _log.warning("%s", detail)
                return LoadedWeights("none", detail)
            part = module if kind == "coco" else self._trunk(module)
            if part is not None:
                part.load_state_dict(fitting(part, state), strict=False)
                return LoadedWeights(kind, str(enum))
        return LoadedWeights("none", "torchvision has no weights for this network")

    def _load_file(self, module: nn.Module, file: Path) -> LoadedWeights:
        state = read_state(file)
        parts = [part for part in (module, self._trunk(module)) if part is not None]
        fits = [fitting(part, state) for part in parts]
        best = max(range(len(parts)), key=lambda i: len(fits[i]))
        if not fits[best]:
            raise WeightsError(
                f"{file}: none of its {len(state)} entries fits the preset: give weights of its "
                "trunk or of the whole detector"
            )
        parts[best].load_state_dict(fits[best], strict=False)
        return LoadedWeights("file", f"{len(fits[best])} tensors of {file.name}")


@dataclass(frozen=True, slots=True)
class _Rows:
    """Finds the rows of a tensor: `each` for every output, grouped by anchor or by output."""

    each: int
    anchor_major: bool


def _moved(
    known: Tensor | None,
    fresh: Tensor,
    rows: _Rows,
    old: int,
    new: int,
    kept: Sequence[tuple[int, int]],
) -> Tensor:
    """Puts the rows of kept labels, and of the background, into a fresh tensor."""
    # Some networks have no output for the background.
    background = 1 if fresh.shape[0] == rows.each * (new + 1) else 0
    before, after = (
        (rows.each, count) if rows.anchor_major else (count, rows.each)
        for count in (old + background, new + background)
    )
    if (
        known is None
        or known.shape[1:] != fresh.shape[1:]
        or known.shape[0] != rows.each * (old + background)
        or fresh.shape[0] != rows.each * (new + background)
    ):
        return fresh
    source = known.reshape(*before, *known.shape[1:])
    result = fresh.to(known.device).clone().reshape(*after, *fresh.shape[1:])
    pairs = [(0, 0)] * background + [(o + background, n + background) for o, n in kept]
    for was, becomes in pairs:
        if rows.anchor_major:
            result[:, becomes] = source[:, was]
        else:
            result[becomes] = source[was]
    return result.reshape(fresh.shape)


class _Normalise(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Normalises and batches as torchvision's transform does, and leaves sizes alone."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


def _stop_resizing(module: nn.Module) -> None:
    """Replaces every transform of torchvision within a module by one that does not resize."""
    replaced: dict[GeneralizedRCNNTransform, _Normalise] = {}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, GeneralizedRCNNTransform) and not isinstance(child, _Normalise):
                if child not in replaced:
                    replaced[child] = _Normalise(
                        child.min_size,
                        child.max_size,
                        child.image_mean,
                        child.image_std,
                        child.size_divisible,
                    )
                setattr(parent, name, replaced[child])


def _resize(image: Tensor, size: InputSize) -> Tensor:
    """Resizes as torchvision's transform does."""
    resized: Tensor = functional.interpolate(
        image[None],
        scale_factor=size.scale(*image.shape[-2:]),
        mode="bilinear",
        recompute_scale_factor=True,
        align_corners=False,
    )[0]
    return resized


def _protocol(target: Target) -> dict[str, Any]:
    masks: Mapping[str, Tensor] = {} if target.masks is None else {"masks": target.masks.byte()}
    return {"boxes": target.boxes, "labels": target.labels + 1, **masks}
