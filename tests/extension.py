"""Installs a package with one entry point for a test, as pip would."""

from __future__ import annotations

from pathlib import Path

import pytest

from ml_backend.extensions import Registry


def install_extension(
    registry: Registry, name: str, path: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Makes a package importable that declares an entry point; undone after the test.

    Args:
        registry: the registry that finds the entry point by its group.
        name: the name of the extension.
        path: its import path, `package.module:attribute`.
        folder: an empty folder for the package's metadata.
        monkeypatch: undoes it.
    """
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.group}]\n{name} = {path}\n")
    monkeypatch.syspath_prepend(str(folder))
    # The registry reads the entry points once.
    monkeypatch.setitem(vars(registry), "paths", {})
    del registry.paths
