"""The artefact store in a folder: versions are written whole or not at all."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ml_backend.store.artefacts import ArtefactStore, StoreUnavailable, VersionMissing


def _write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def test_publish_existing_version_raises_and_keeps_the_files(tmp_path: Path) -> None:
    store = ArtefactStore(tmp_path)
    folder = store.publish("1.5", "v1", _write, {"version": "v1"})
    assert store.existing("1.5", "v1") == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(FileExistsError):
        store.publish("1.5", "v1", _write, {})


def test_publish_disk_full_leaves_nothing(tmp_path: Path) -> None:
    store = ArtefactStore(tmp_path)

    def fail(folder: Path) -> None:
        _write(folder)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        store.publish("1.5", "v1", fail, {})
    assert list((tmp_path / "projects/1.5").iterdir()) == []


def test_sweep_folder_of_a_killed_process_is_deleted(tmp_path: Path) -> None:
    store = ArtefactStore(tmp_path)
    store.publish("1.5", "v1", _write, {})
    (tmp_path / "projects/1.5/.building-x").mkdir()
    store.sweep("1.5")
    assert [p.name for p in (tmp_path / "projects/1.5").iterdir()] == ["v1"]


def test_sweep_leaves_the_folders_of_other_projects(tmp_path: Path) -> None:
    other = tmp_path / "projects/2.5/.building-x"
    other.mkdir(parents=True)
    ArtefactStore(tmp_path).sweep("1.5")
    assert other.is_dir()


def test_remove_unrecorded_deletes_versions_without_a_record(tmp_path: Path) -> None:
    store = ArtefactStore(tmp_path)
    before = datetime.now(UTC) - timedelta(minutes=1)
    for version in ("v1", "v2", "v3"):
        store.publish("1.5", version, _write, {})
    store.publish("2.5", "v1", _write, {})
    assert store.remove_unrecorded("1.5", {"v2"}, before) == ["v1", "v3"]
    assert [p.name for p in (tmp_path / "projects/1.5").iterdir()] == ["v2"]
    store.check("2.5", "v1")


def test_remove_unrecorded_keeps_versions_older_than_the_project_s_record(tmp_path: Path) -> None:
    store = ArtefactStore(tmp_path)
    store.publish("1.5", "v1", _write, {})
    assert store.remove_unrecorded("1.5", set(), datetime.now(UTC) + timedelta(minutes=1)) == []
    store.check("1.5", "v1")


def test_existing_missing_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(VersionMissing, match="v7"):
        ArtefactStore(tmp_path).existing("1.5", "v7")


@pytest.mark.parametrize("name", ["../v1", "", ".hidden", "a/b"])
def test_folder_name_that_leads_out_of_the_store_raises(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        ArtefactStore(tmp_path).folder("1.5", name)


def test_check_missing_version_raises(tmp_path: Path) -> None:
    store = ArtefactStore(tmp_path)
    store.publish("1.5", "v1", _write, {})
    store.check("1.5", "v1")
    with pytest.raises(VersionMissing, match="v7"):
        store.check("1.5", "v7")


def test_probe_folder_that_cannot_be_written_names_setting_and_remedy(tmp_path: Path) -> None:
    assert str(tmp_path) in ArtefactStore(tmp_path).probe()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreUnavailable, match=r"ML_BACKEND_ARTEFACTS_URL: .*file.* name a folder"):
        ArtefactStore(tmp_path / "file").probe()
