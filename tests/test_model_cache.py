"""Loaded models: how long each stays open, and which are evicted when memory is scarce."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ml_backend.backend import Backend
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets.tiny import PRESET as TINY
from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.projects.clients import Clients
from ml_backend.serving import model_cache as module
from ml_backend.serving.batching import PredictorClosed
from ml_backend.serving.model_cache import ModelCache
from ml_backend.serving.predictions import Serving
from ml_backend.settings import load_settings
from ml_backend.store.tables import Project
from tests.conftest import make_live, wait_for

CPU = torch.device("cpu")
CONFIG = """<View><Image name="image" value="$image"/><RectangleLabels name="box" toName="image">
<Label value="car"/></RectangleLabels></View>"""
PICTURE = Image.new("RGB", (96, 64), "grey")


class Cache:
    """A model cache, the projects that use it, and the detectors that it has loaded.

    Args:
        folder: `MODEL_DIR`.
        monkeypatch: counts the loads, and shortens the watch for promotions.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = {
            "MODEL_DIR": str(folder),
            "ML_BACKEND_WEIGHTS": "none",
            "ML_BACKEND_DEVICE": "cpu",
        }
        self.backend = Backend(load_settings(settings))
        self.models = ModelCache(
            self.backend.settings, self.backend.database, self.backend.artefacts
        )
        self._detectors: list[weakref.ref[Detector]] = []
        self._threads: list[threading.Thread] = []
        load = Detector.load

        def remembered(folder: Path, device: torch.device) -> Detector:
            detector = load(folder, device)
            self._detectors.append(weakref.ref(detector))
            return detector

        monkeypatch.setattr(Detector, "load", remembered)
        monkeypatch.setattr(module, "_WATCH", 0.05)

    def promote(self, number: int, name: str = "v1") -> Project:
        """Make a version of a project live; return the project."""
        detector = Detector.pretrained(TINY, ("car",), "none", CPU)
        detector.thresholds = {"car": 0.0}
        key = f"{number}.1795463889"
        make_live(self.backend, detector, name, key=key, label_config=CONFIG)
        return self.backend.ingest.introduce(key, number, label_config=CONFIG)

    def use(self, project: Project) -> None:
        """Predict an image of a project."""
        with self.models.using(project) as model:
            assert model is not None
            model.predictor.submit(PICTURE).result()

    def in_memory(self) -> int:
        """Count the detectors that are in memory, used or not."""
        gc.collect()
        return sum(detector() is not None for detector in self._detectors)

    def loads(self) -> int:
        """Count how often a detector was loaded from its files."""
        return len(self._detectors)

    def watch(self) -> None:
        """Follow promotions, as a server does."""
        self._threads.append(threading.Thread(target=self.models.watch))
        self._threads[-1].start()

    def close(self) -> None:
        """Close the models and the database."""
        self.models.close()
        for thread in self._threads:
            thread.join()
        self.backend.database.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    """Make a cache that holds no model."""
    made = Cache(tmp_path, monkeypatch)
    yield made
    made.close()


def _memory(monkeypatch: pytest.MonkeyPatch, left: Callable[[], float]) -> None:
    monkeypatch.setattr(module, "_memory_left", lambda device: left())


def test_using_memory_is_scarce_evicts_only_the_least_recently_used_model(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    projects = [cache.promote(number) for number in range(1, 5)]
    _memory(monkeypatch, lambda: 0.5 if cache.in_memory() <= 3 else 0.01)
    for project in projects:
        cache.use(project)
    # Loading the fourth evicts the first, which was used longest ago, and no other.
    assert cache.in_memory() == 3
    assert cache.loads() == 4
    for project in projects[1:]:
        cache.use(project)
    assert cache.loads() == 4
    cache.use(projects[0])
    assert cache.loads() == 5
    assert cache.in_memory() == 3


def test_using_memory_stays_scarce_keeps_models_in_use_and_the_newest(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (cache.promote(number) for number in (1, 2, 3))
    _memory(monkeypatch, lambda: 0.01)
    with cache.models.using(first) as model:
        assert model is not None
        cache.use(second)
        cache.use(third)
        assert model.predictor.submit(PICTURE).result() is not None
    cache.use(first)
    cache.use(third)
    assert cache.loads() == 3


def test_using_promotion_meanwhile_keeps_the_version_until_released(cache: Cache) -> None:
    project = cache.promote(1)
    with cache.models.using(project) as old:
        assert old is not None
        cache.watch()
        cache.promote(1, "v2")
        wait_for(lambda: cache.models.version(project) == "v2", within=30, what="v2 serves")
        assert old.version == "v1"
        assert old.predictor.submit(PICTURE).result() is not None
    with pytest.raises(PredictorClosed):
        old.predictor.submit(PICTURE)
    old.predictor.wait()
    del old
    wait_for(lambda: cache.in_memory() == 1, within=10, what="v1 is gone")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", "not this"),
        ("detector.json", '{"preset": "tiny", "labels": ["car"], "thresholds": []}'),
        ("acquisition.safetensors", ""),
        ("out_of_fold.json", '{"labels": ["car"], "predic'),
    ],
)
def test_using_damaged_file_serves_the_earlier_version_until_it_is_restored(
    file: str, content: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY", 1.0)
    cache.promote(1)
    project = cache.promote(1, "v2")
    path = cache.backend.artefacts.existing(project.key, "v2") / file
    whole = path.read_bytes() if path.exists() else None
    path.write_text(content)
    cache.use(project)
    assert cache.models.version(project) == "v1"
    cache.watch()
    if whole is None:
        path.unlink()
    else:
        path.write_bytes(whole)
    wait_for(lambda: cache.models.version(project) == "v2", within=30, what="v2 serves")
    cache.use(project)


class _SlowImages:
    """A source of images that answers only after `through` is set.

    Args:
        picture: the image that each request gets, encoded.
    """

    def __init__(self, picture: bytes) -> None:
        self.through = threading.Event()
        self._picture = picture

    def fetch(self, task: int | None, value: str) -> bytes:
        """Wait for `through`; return the picture."""
        self.through.wait(300)
        return self._picture


def test_predict_deadline_passed_keeps_the_model_until_its_images_end(
    cache: Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    project, other = cache.promote(1), cache.promote(2)
    PICTURE.save(tmp_path / "picture.png")
    images = _SlowImages((tmp_path / "picture.png").read_bytes())
    monkeypatch.setattr(Clients, "images", lambda *_: images)
    serving = Serving(cache.backend.settings, cache.models, cache.backend.label_studios)
    task: dict[str, Any] = {"id": 1, "data": {"image": "x"}}
    predicted = serving.predict(
        project, parse_label_config(CONFIG), [task], deadline=time.monotonic() + 3
    )
    assert predicted.unfinished == [0]
    _memory(monkeypatch, lambda: 0.01)
    cache.use(other)
    assert cache.in_memory() == 2
    images.through.set()
    # The model is released only when the work on the image has ended.
    third = cache.promote(3)
    wait_for(lambda: _idle(cache, project), within=30, what="the work on the image ends")
    cache.use(third)
    assert cache.in_memory() == 1
    assert not caplog.records


def _idle(cache: Cache, project: Project) -> bool:
    with cache.models.using(project) as model:
        assert model is not None
        return model._users == 1
