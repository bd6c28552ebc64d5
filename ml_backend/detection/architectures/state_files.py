"""Reads files of weights, and finds the tensors in them that fit a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ml_backend.detection.architectures.base import WeightsError


def read_state(file: Path) -> Mapping[str, object]:
    """Reads a state from safetensors, or from PyTorch's format without running code.

    Raises:
        WeightsError: the file cannot be read, or holds no state.
    """
    try:
        state: object = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except UnpicklingError as error:
        # PyTorch's own message advises to let the file run code.
        raise WeightsError(
            f"{file} cannot be read as weights: it must be safetensors, or a state that PyTorch "
            "saved and that runs no code"
        ) from error
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{file} cannot be read as weights: {cause}") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{file} cannot be read as weights: it holds a {type(state).__name__}")
    return state


def fitting(module: nn.Module, state: Mapping[str, object]) -> dict[str, Tensor]:
    """Selects the tensors of a state whose name and shape fit a module."""
    own = module.state_dict()
    return {
        name: tensor
        for name, tensor in state.items()
        if name in own and isinstance(tensor, Tensor) and own[name].shape == tensor.shape
    }
