"""Adds the setting that mends an error of `detection`, which itself knows no settings."""

from __future__ import annotations

from ml_backend.detection.architectures.base import WeightsError
from ml_backend.detection.decoding import Flaw, UndecodableImage
from ml_backend.detection.device import DeviceError, DevicesTaken
from ml_backend.detection.presets import PresetError


def with_remedy(error: Exception) -> str:
    """Puts an error into one line that names the setting to change, where there is one."""
    match error:
        case PresetError():
            return f"ML_BACKEND_PRESET: {error}"
        case WeightsError():
            return f"ML_BACKEND_WEIGHTS: {error}"
        case DevicesTaken():
            return f"{error}; set WORKERS={error.count}, one for each GPU, and start one server"
        case DeviceError():
            return f"{error}, or change ML_BACKEND_DEVICE (ML_BACKEND_DEVICE=cpu needs no GPU)"
        case UndecodableImage(flaw=Flaw.TOO_LARGE):
            return f"{error} (ML_BACKEND_IMAGE_MAX_PIXELS)"
        case UndecodableImage(flaw=Flaw.WEB_PAGE):
            return f"{error}, so the token of Label Studio is missing or wrong"
        case _:
            return str(error)
