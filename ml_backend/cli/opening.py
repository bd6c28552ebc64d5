"""Opens settings, backend and project for commands."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import typer

from ml_backend.cli.output import fail, say_wrong
from ml_backend.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from ml_backend.backend import Backend
    from ml_backend.store.tables import Project


def open_settings() -> Settings:
    """Reads the settings and sets up logging by them.

    Raises:
        SettingsError: a setting is unknown or wrong.
    """
    settings = load_settings()
    logging.basicConfig(level=settings.log_level, format="%(levelname)s %(message)s")
    return settings


def open_backend() -> Backend:
    """Makes the backend of the settings.

    Raises:
        SettingsError: a setting is unknown or wrong, or `MODEL_DIR` cannot be used.
    """
    from ml_backend.backend import Backend

    return Backend(open_settings())


def find_project(backend: Backend, name: str) -> Project:
    """Finds the project that an option names; ends the command where there is none.

    Args:
        backend: knows the projects.
        name: the project's key, or its id where that is clear.
    """
    from ml_backend.label_studio.events import InvalidEvent
    from ml_backend.projects import find

    try:
        return find.find_project(backend.database, name)
    except find.ProjectNotFound as error:
        raise fail(str(error)) from None
    except InvalidEvent as error:
        say_wrong("option", error)
        raise typer.Exit(2) from None


def check_device(settings: Settings) -> str:
    """Describes the device, once device, preset, weights and extensions are known to be usable.

    Any of them would otherwise fail in the first request or training. This imports torch.

    Raises:
        SettingsError: preset or weights cannot be used.
        ExtensionError: another package's extension cannot be imported.
        typer.Exit: the device cannot be used.
    """
    from ml_backend.detection.device import DeviceError, describe_device, resolve_device
    from ml_backend.detection.presets import check
    from ml_backend.extensions import check_extensions
    from ml_backend.remedies import with_remedy

    check_extensions()
    try:
        device = resolve_device(settings.device)
        check(settings.preset, settings.weights, device)
    except DeviceError as error:
        raise fail(with_remedy(error)) from None
    except ValueError as error:
        raise SettingsError(with_remedy(error)) from None
    return ", ".join(map(str, describe_device(device).values()))
