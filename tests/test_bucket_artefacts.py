"""The artefact store in a bucket, against a real S3 server: hosts share versions, files do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import s3fs
import torch
from PIL import Image

from ml_backend.backend import Backend
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets.tiny import PRESET as TINY
from ml_backend.serving.model_cache import ModelCache
from ml_backend.settings import SettingsError, load_settings
from ml_backend.store.artefacts import ArtefactStore, StoreUnavailable, VersionMissing
from ml_backend.store.bucket_artefacts import BucketArtefactStore
from ml_backend.store.tables import Project
from tests.conftest import ROOT, make_live
from tests.s3_server import S3Server, running_s3

KEY = "1.1795463889"
CONFIG = """<View><Image name="image" value="$image"/><RectangleLabels name="box" toName="image">
<Label value="car"/></RectangleLabels></View>"""
FUTURE = -3600.0
"""An age of abandoned uploads, in seconds, that every upload has."""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """Run an S3 server for all tests of this file; each has a bucket of its own."""
    with running_s3() as server:
        yield server


@pytest.fixture
def url(
    server: S3Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Return the URL of a store in an empty bucket, which the environment can reach."""
    for name, value in server.environ().items():
        monkeypatch.setenv(name, value)
    name = request.node.name.partition("[")[0].replace("_", "-")[-60:].strip("-")
    yield server.make_bucket(name) + "/models"
    # fsspec keeps connections, which belong to this environment.
    s3fs.S3FileSystem.clear_instance_cache()


def _write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(100_000))
    (folder / "detector.json").write_text("{}")


def _objects(url: str) -> list[str]:
    files = s3fs.S3FileSystem(use_listings_cache=False)
    root = url.removeprefix("s3://")
    return sorted(path.removeprefix(f"{root}/") for path in files.find(root))


def _cached(store: ArtefactStore) -> list[str]:
    project = store.folder(KEY, "any").parent
    return sorted(path.name for path in project.iterdir() if not path.name.startswith("."))


def _cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the server unreachable for this process."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()


def test_publish_on_one_host_existing_on_another_gives_the_same_files(
    url: str, tmp_path: Path
) -> None:
    one = BucketArtefactStore(url, tmp_path / "one")
    other = BucketArtefactStore(url, tmp_path / "other")
    published = one.publish(KEY, "v1", _write, {"version": "v1"})
    other.check(KEY, "v1")
    assert not other.folder(KEY, "v1").exists()
    loaded = other.existing(KEY, "v1")
    assert loaded.is_relative_to(tmp_path / "other")
    names = {"card.json", "detector.json", "model.safetensors"}
    assert {path.name for path in loaded.iterdir()} == names
    for name in names:
        assert (loaded / name).read_bytes() == (published / name).read_bytes()


def test_publish_version_of_another_host_raises_and_keeps_its_files(
    url: str, tmp_path: Path
) -> None:
    BucketArtefactStore(url, tmp_path / "one").publish(KEY, "v1", _write, {"by": "one"})
    other = BucketArtefactStore(url, tmp_path / "other")
    with pytest.raises(FileExistsError):
        other.publish(KEY, "v1", _write, {"by": "other"})
    assert json.loads((other.existing(KEY, "v1") / "card.json").read_text()) == {"by": "one"}


def test_existing_cached_version_is_not_downloaded_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BucketArtefactStore(url, tmp_path / "one").publish(KEY, "v1", _write, {})
    other = BucketArtefactStore(url, tmp_path / "other")
    folder = other.existing(KEY, "v1")
    _cut_off(monkeypatch)
    assert other.existing(KEY, "v1") == folder
    other.check(KEY, "v1")


def test_existing_half_upload_is_no_version_until_sweep_deletes_it(
    url: str, tmp_path: Path
) -> None:
    store = BucketArtefactStore(url, tmp_path)
    store.publish(KEY, "v1", _write, {})
    files = s3fs.S3FileSystem()
    files.pipe_file(f"{url}/projects/{KEY}/v2/model.safetensors", b"weights")
    for ask in (store.check, store.existing):
        with pytest.raises(VersionMissing, match=f"version v2 is not in {url}"):
            ask(KEY, "v2")
    store.sweep(KEY)
    assert f"projects/{KEY}/v2/model.safetensors" in _objects(url), "it may be going on"
    BucketArtefactStore(url, tmp_path, abandoned_after=FUTURE).sweep(KEY)
    assert {path.split("/")[2] for path in _objects(url)} == {"v1"}


def test_remove_unrecorded_deletes_whole_and_half_uploads_without_a_record(
    url: str, tmp_path: Path
) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    killed = BucketArtefactStore(url, tmp_path / "killed")
    for version in ("v1", "v2"):
        killed.publish(KEY, version, _write, {})
    half = f"{url}/projects/{KEY}/v3/model.safetensors"
    s3fs.S3FileSystem().pipe_file(half, b"weights")
    store = BucketArtefactStore(url, tmp_path / "one")
    assert store.remove_unrecorded(KEY, {"v1"}, before) == ["v2", "v3"]
    assert {path.split("/")[2] for path in _objects(url)} == {"v1"}
    killed.sweep(KEY)
    assert _cached(killed) == ["v1"]


def test_remove_unrecorded_bucket_unreachable_raises_and_deletes_nothing(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BucketArtefactStore(url, tmp_path)
    store.publish(KEY, "v1", _write, {})
    _cut_off(monkeypatch)
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        store.remove_unrecorded(KEY, set(), datetime.now(UTC) - timedelta(minutes=1))
    assert _cached(store) == ["v1"]


def test_existing_damaged_file_in_the_bucket_is_refused(url: str, tmp_path: Path) -> None:
    BucketArtefactStore(url, tmp_path / "one").publish(KEY, "v1", _write, {})
    s3fs.S3FileSystem().pipe_file(f"{url}/projects/{KEY}/v1/model.safetensors", b"other weights")
    other = BucketArtefactStore(url, tmp_path / "other")
    with pytest.raises(VersionMissing, match=r"damaged: model\.safetensors"):
        other.existing(KEY, "v1")
    assert _cached(other) == []


DIES_AT_EACH_STEP = """
import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import s3fs
from aiobotocore.client import AioBaseClient

from ml_backend.store.bucket_artefacts import BucketArtefactStore
from tests.test_bucket_artefacts import KEY, _write

url, folder = sys.argv[1], Path(sys.argv[2])
call, rename, fsync = AioBaseClient._make_api_call, os.rename, os.fsync


def publish(die_at):
    steps = 0

    def step():
        # Called before each request, flush and rename, which is also after the one before.
        nonlocal steps
        steps += 1
        if steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    async def counted_call(*args, **kwargs):
        step()
        return await call(*args, **kwargs)

    def counted(of):
        def called(*args, **kwargs):
            step()
            of(*args, **kwargs)

        return called

    AioBaseClient._make_api_call = counted_call
    os.rename, os.fsync = counted(rename), counted(fsync)
    BucketArtefactStore(url, folder).publish(KEY, f"v{die_at}", _write, {"step": die_at})
    os._exit(0)


die_at, status = 0, -signal.SIGKILL
while status == -signal.SIGKILL:
    die_at += 1
    child = os.fork()
    if not child:
        publish(die_at)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 0, status
print(die_at)
"""


def test_publish_killed_at_any_step_leaves_no_version_or_a_whole_one(
    url: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIES_AT_EACH_STEP, url, str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    assert last > 7
    other = BucketArtefactStore(url, tmp_path / "other", abandoned_after=FUTURE)
    whole = []
    for step in range(1, last + 1):
        try:
            folder = other.existing(KEY, f"v{step}")
        except VersionMissing:
            continue
        whole.append(step)
        assert (folder / "model.safetensors").read_bytes() == bytes(100_000)
        assert json.loads((folder / "card.json").read_text()) == {"step": step}
    # A version exists from the upload of its manifest on.
    assert 1 < len(whole) < last
    assert whole == list(range(whole[0], last + 1))
    other.sweep(KEY)
    assert {path.split("/")[2] for path in _objects(url)} == {f"v{step}" for step in whole}
    # The host that was killed goes on with what it had.
    again = BucketArtefactStore(url, tmp_path / "killed")
    again.sweep(KEY)
    for step in whole:
        again.existing(KEY, f"v{step}")
    assert list(again.folder(KEY, "any").parent.glob(".*")) == []


def test_remove_deletes_from_the_bucket_and_in_time_from_other_caches(
    url: str, tmp_path: Path
) -> None:
    one = BucketArtefactStore(url, tmp_path / "one")
    other = BucketArtefactStore(url, tmp_path / "other")
    for version in ("v1", "v2"):
        one.publish(KEY, version, _write, {})
    other.existing(KEY, "v1")
    one.remove(KEY, "v1")
    assert _cached(one) == ["v2"]
    assert {path.split("/")[2] for path in _objects(url)} == {"v2"}
    other.existing(KEY, "v2")
    assert _cached(other) == ["v2"]
    with pytest.raises(VersionMissing):
        other.existing(KEY, "v1")


def test_remove_bucket_unreachable_is_done_by_the_next_sweep(
    url: str, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BucketArtefactStore(url, tmp_path)
    for version in ("v1", "v2"):
        store.publish(KEY, version, _write, {})
    _cut_off(monkeypatch)
    store.remove(KEY, "v1")
    store.sweep(KEY)
    assert _cached(store) == ["v2"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    s3fs.S3FileSystem.clear_instance_cache()
    store.sweep(KEY)
    assert {path.split("/")[2] for path in _objects(url)} == {"v2"}
    assert list(store.folder(KEY, "any").parent.glob(".*")) == []


def test_existing_version_from_before_the_bucket_is_uploaded(url: str, tmp_path: Path) -> None:
    ArtefactStore(tmp_path / "one").publish(KEY, "v1", _write, {"version": "v1"})
    one = BucketArtefactStore(url, tmp_path / "one")
    one.check(KEY, "v1")
    one.existing(KEY, "v1")
    other = BucketArtefactStore(url, tmp_path / "other")
    assert (other.existing(KEY, "v1") / "model.safetensors").read_bytes() == bytes(100_000)


def test_publish_disk_or_writer_fails_leaves_no_version(url: str, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        _write(folder)
        raise OSError("no space left on device")

    store = BucketArtefactStore(url, tmp_path)
    with pytest.raises(OSError, match="no space"):
        store.publish(KEY, "v1", fail, {})
    assert _objects(url) == []
    assert list(store.folder(KEY, "any").parent.iterdir()) == []


def test_probe_usable_bucket_says_where_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    assert url in BucketArtefactStore(url, tmp_path).probe()
    assert _objects(url) == []


def _one_line(store: ArtefactStore) -> str:
    with pytest.raises(StoreUnavailable) as caught:
        store.probe()
    line = str(caught.value)
    assert line.startswith("ML_BACKEND_ARTEFACTS_URL: ")
    assert "\n" not in line
    return line


def test_probe_missing_bucket_says_to_create_it(url: str, tmp_path: Path) -> None:
    line = _one_line(BucketArtefactStore("s3://no-such-bucket/models", tmp_path))
    assert "s3://no-such-bucket/models" in line
    assert "create the bucket" in line


def test_probe_wrong_key_names_the_credentials(url: str, server: S3Server, tmp_path: Path) -> None:
    server.check_credentials(True)
    try:
        line = _one_line(BucketArtefactStore(url, tmp_path))
    finally:
        server.check_credentials(False)
    assert "access is denied" in line
    assert "AWS_ACCESS_KEY_ID" in line


def test_probe_no_credentials_names_them(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    assert "AWS_ACCESS_KEY_ID" in _one_line(BucketArtefactStore(url, tmp_path))


def test_probe_unreachable_endpoint_names_its_variable(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_off(monkeypatch)
    line = _one_line(BucketArtefactStore(url, tmp_path))
    assert "http://127.0.0.1:9" in line
    assert "AWS_ENDPOINT_URL" in line


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("s3://x", "s3fs", "s3"), ("gs://x/y", "gcsfs", "gs")]
)
def test_store_without_its_extra_names_the_extra(
    url: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match=rf"ML_BACKEND_ARTEFACTS_URL.*{package}.*\[{extra}\]"):
        BucketArtefactStore(url, tmp_path)


@pytest.mark.parametrize("wrong", ["s3://", "ftp://host/models", "https://bucket", "s3://a:b@c/d"])
def test_settings_wrong_artefacts_url_is_named(wrong: str) -> None:
    with pytest.raises(SettingsError, match="ML_BACKEND_ARTEFACTS_URL"):
        load_settings({"ML_BACKEND_ARTEFACTS_URL": wrong})


def test_backend_artefacts_folder_holds_versions_outside_model_dir(tmp_path: Path) -> None:
    settings = {"MODEL_DIR": str(tmp_path / "a"), "ML_BACKEND_ARTEFACTS_URL": str(tmp_path / "b")}
    folder = Backend(load_settings(settings)).artefacts.publish(KEY, "v1", _write, {})
    assert folder == tmp_path / "b" / "projects" / KEY / "v1"


def _host(folder: Path, url: str, database: Path) -> Backend:
    return Backend(
        load_settings(
            {
                "MODEL_DIR": str(folder),
                "DATABASE_URL": f"sqlite:///{database}",
                "ML_BACKEND_ARTEFACTS_URL": url,
                "ML_BACKEND_WEIGHTS": "none",
                "ML_BACKEND_DEVICE": "cpu",
            }
        )
    )


def _predicts(models: ModelCache, project: Project) -> bool:
    with models.using(project) as model:
        if model is None:
            return False
        model.predictor.submit(Image.new("RGB", (96, 64))).result()
        return True


def test_serving_bucket_unreachable_goes_on_with_cached_versions(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, server, restarted, new = (
        _host(tmp_path / name, url, tmp_path / "shared.db")
        for name in ("trainer", "server", "server", "new")
    )
    detector = Detector.pretrained(TINY, ("car",), "none", torch.device("cpu"))
    detector.thresholds = {"car": 0.0}
    make_live(trainer, detector, "v1", key=KEY, label_config=CONFIG)
    project = trainer.ingest.introduce(KEY, 1, label_config=CONFIG)
    models = [ModelCache(b.settings, b.database, b.artefacts) for b in (server, restarted, new)]
    serving, after_restart, empty_cache = models
    assert _predicts(serving, project)
    _cut_off(monkeypatch)
    assert _predicts(serving, project)
    assert _predicts(after_restart, project)
    assert not _predicts(empty_cache, project)
    for one in models:
        one.close()
    for backend in (trainer, server, restarted, new):
        backend.database.close()
