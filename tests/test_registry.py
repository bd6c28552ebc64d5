"""The registry of versions: written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ml_backend.store.registry import Registry, VersionMissing


def _write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def test_a_version_is_there_whole_and_never_overwritten(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    folder = registry.publish("1.5", "v1", _write, {"version": "v1"})
    assert registry.existing("1.5", "v1") == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(FileExistsError):
        registry.publish("1.5", "v1", _write, {})


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path)

    def fail(folder: Path) -> None:
        _write(folder)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        registry.publish("1.5", "v1", fail, {})
    assert registry.versions("1.5") == []
    assert list((tmp_path / "projects/1.5").iterdir()) == []


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.publish("1.5", "v1", _write, {})
    (tmp_path / "projects/1.5/.building-x").mkdir()
    registry.sweep()
    assert [p.name for p in (tmp_path / "projects/1.5").iterdir()] == ["v1"]


def test_a_missing_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(VersionMissing, match="v7"):
        Registry(tmp_path).existing("1.5", "v7")


@pytest.mark.parametrize("name", ["../v1", "", ".hidden", "a/b"])
def test_a_name_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        Registry(tmp_path).folder("1.5", name)
