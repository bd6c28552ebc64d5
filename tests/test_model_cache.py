"""Loaded models: how long each stays, who it stays for, and what goes when memory is scarce."""

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
from ml_backend.projects.clients import LabelStudios
from ml_backend.serving import model_cache as module
from ml_backend.serving.batching import PredictorClosed
from ml_backend.serving.model_cache import Models
from ml_backend.serving.predictions import Serving
from ml_backend.settings import load_settings
from ml_backend.store.tables import Project
from tests.conftest import make_live, wait_for

CPU = torch.device("cpu")
CONFIG = """<View><Image name="image" value="$image"/><RectangleLabels name="box" toName="image">
<Label value="car"/></RectangleLabels></View>"""
PICTURE = Image.new("RGB", (96, 64), "grey")


class Loaded:
    """Models of several projects, and the detectors that are in memory."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = {
            "MODEL_DIR": str(folder),
            "ML_BACKEND_WEIGHTS": "none",
            "ML_BACKEND_DEVICE": "cpu",
        }
        self.backend = Backend(load_settings(settings))
        self.models = Models(self.backend.settings, self.backend.database, self.backend.registry)
        self._detectors: list[weakref.ref[Detector]] = []
        self._threads: list[threading.Thread] = []
        load = Detector.load

        def remembered(folder: Path, device: torch.device) -> Detector:
            detector = load(folder, device)
            self._detectors.append(weakref.ref(detector))
            return detector

        monkeypatch.setattr(Detector, "load", remembered)
        monkeypatch.setattr(module, "_WATCH", 0.05)

    def learn(self, number: int, name: str = "v1") -> Project:
        """Makes a version live; answers its project."""
        detector = Detector.pretrained(TINY, ("car",), "none", CPU)
        detector.thresholds = {"car": 0.0}
        key = f"{number}.1795463889"
        make_live(self.backend, detector, name, key=key, label_config=CONFIG)
        return self.backend.ingest.introduce(key, number, label_config=CONFIG)

    def use(self, project: Project) -> None:
        """Predicts something."""
        with self.models.using(project) as model:
            assert model is not None
            model.predictor.submit(PICTURE).result()

    def in_memory(self) -> int:
        """How many detectors are there, needed or not."""
        gc.collect()
        return sum(detector() is not None for detector in self._detectors)

    def loads(self) -> int:
        """How often one was loaded."""
        return len(self._detectors)

    def watch(self) -> None:
        """Follows promotions, as a server does."""
        self._threads.append(threading.Thread(target=self.models.watch))
        self._threads[-1].start()

    def close(self) -> None:
        """Ends it."""
        self.models.close()
        for thread in self._threads:
            thread.join()
        self.backend.database.close()


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    """No model yet."""
    made = Loaded(tmp_path, monkeypatch)
    yield made
    made.close()


def _memory(monkeypatch: pytest.MonkeyPatch, left: Callable[[], float]) -> None:
    monkeypatch.setattr(module, "_memory_left", lambda device: left())


def test_scarce_memory_costs_as_many_models_as_it_must(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    projects = [loaded.learn(number) for number in range(1, 5)]
    _memory(monkeypatch, lambda: 0.5 if loaded.in_memory() <= 3 else 0.01)
    for project in projects:
        loaded.use(project)
    # The fourth took the place of the one used longest ago, and of no other.
    assert loaded.in_memory() == 3
    assert loaded.loads() == 4
    for project in projects[1:]:
        loaded.use(project)
    assert loaded.loads() == 4
    loaded.use(projects[0])
    assert loaded.loads() == 5
    assert loaded.in_memory() == 3


def test_where_nothing_helps_what_is_used_and_what_was_just_loaded_stay(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (loaded.learn(number) for number in (1, 2, 3))
    _memory(monkeypatch, lambda: 0.01)
    with loaded.models.using(first) as model:
        assert model is not None
        loaded.use(second)
        loaded.use(third)
        assert model.predictor.submit(PICTURE).result() is not None
    loaded.use(first)
    loaded.use(third)
    assert loaded.loads() == 3


def test_who_began_on_a_version_ends_on_it(loaded: Loaded) -> None:
    project = loaded.learn(1)
    with loaded.models.using(project) as old:
        assert old is not None
        loaded.watch()
        loaded.learn(1, "v2")
        wait_for(lambda: loaded.models.version(project) == "v2", within=30, what="v2 serves")
        assert old.version == "v1"
        assert old.predictor.submit(PICTURE).result() is not None
    with pytest.raises(PredictorClosed):
        old.predictor.submit(PICTURE)
    old.predictor.wait()
    del old
    wait_for(lambda: loaded.in_memory() == 1, within=10, what="v1 is gone")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", "not this"),
        ("detector.json", '{"preset": "tiny", "labels": ["car"], "thresholds": []}'),
        ("acquisition.safetensors", ""),
        ("out_of_fold.json", '{"labels": ["car"], "predic'),
    ],
)
def test_a_version_with_a_damaged_part_serves_again_once_that_is_restored(
    file: str, content: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY", 1.0)
    loaded.learn(1)
    project = loaded.learn(1, "v2")
    path = loaded.backend.registry.existing(project.key, "v2") / file
    whole = path.read_bytes() if path.exists() else None
    path.write_text(content)
    loaded.use(project)
    assert loaded.models.version(project) == "v1"
    loaded.watch()
    if whole is None:
        path.unlink()
    else:
        path.write_bytes(whole)
    wait_for(lambda: loaded.models.version(project) == "v2", within=30, what="v2 serves")
    loaded.use(project)


class _Slow:
    """Images that come when they are let through."""

    def __init__(self, picture: bytes) -> None:
        self.through = threading.Event()
        self._picture = picture

    def fetch(self, task: int | None, value: str) -> bytes:
        """A picture, after all."""
        self.through.wait(300)
        return self._picture


def test_what_goes_on_beyond_a_deadline_keeps_its_model(
    loaded: Loaded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    project, other = loaded.learn(1), loaded.learn(2)
    PICTURE.save(tmp_path / "picture.png")
    images = _Slow((tmp_path / "picture.png").read_bytes())
    monkeypatch.setattr(LabelStudios, "images", lambda *_: images)
    serving = Serving(loaded.backend.settings, loaded.models, loaded.backend.label_studios)
    task: dict[str, Any] = {"id": 1, "data": {"image": "x"}}
    predicted = serving.predict(
        project, parse_label_config(CONFIG), [task], deadline=time.monotonic() + 3
    )
    assert predicted.unfinished == [0]
    _memory(monkeypatch, lambda: 0.01)
    loaded.use(other)
    assert loaded.in_memory() == 2
    images.through.set()
    # It ends well, and only then the model is nobody's.
    third = loaded.learn(3)
    wait_for(lambda: _idle(loaded, project), within=30, what="it is done")
    loaded.use(third)
    assert loaded.in_memory() == 1
    assert not caplog.records


def _idle(loaded: Loaded, project: Project) -> bool:
    with loaded.models.using(project) as model:
        assert model is not None
        return model._users == 1
