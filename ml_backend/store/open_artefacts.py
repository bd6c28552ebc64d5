"""Opens the artefact store that the settings name."""

from __future__ import annotations

from pathlib import Path

from ml_backend.settings import Settings
from ml_backend.store.artefacts import ArtefactStore
from ml_backend.store.bucket_artefacts import BucketArtefactStore


def open_artefact_store(settings: Settings) -> ArtefactStore:
    """Opens the store at `ML_BACKEND_ARTEFACTS_URL`, below `MODEL_DIR` by default.

    Nothing is read or written yet: `ArtefactStore.probe` checks that the store can be used.

    Raises:
        SettingsError: the library of a bucket is not installed.
    """
    url = settings.artefacts_url
    if url is None:
        return ArtefactStore(settings.model_dir)
    if "://" in url:
        return BucketArtefactStore(url, settings.model_dir)
    return ArtefactStore(Path(url))
