"""Check the images and the compose file without building them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

FILES = ["Dockerfile", "Dockerfile.cuda"]
LINTER = shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.skipif(LINTER is None, reason="hadolint has no wheel for this machine")
def test_dockerfile_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run(
        [LINTER or "", str(ROOT / "docker" / name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_dockerfile_copies_existing_files_and_runs_as_a_plain_user(name: str) -> None:
    lines = (ROOT / "docker" / name).read_text().splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    assert ["USER", "1000"] in words
    for source in [w for line in words if line[0] == "COPY" for w in line[1:-1]]:
        assert (ROOT / source).exists()


def test_compose_label_studio_may_reach_private_addresses() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    environment = compose["services"]["label-studio"]["environment"]
    assert environment["ML_BLOCK_LOCAL_IP"] == "false"
    assert environment["SSRF_PROTECTION_ENABLED"] == "false"
    assert compose["services"]["label-studio"]["image"].endswith(":1.23.2")


def test_compose_environment_is_valid_settings() -> None:
    from ml_backend.settings import load_settings

    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    environment = {
        name: value.replace("${", "").split(":")[0] if value.startswith("${") else value
        for name, value in compose["services"]["ml-backend"]["environment"].items()
    }
    settings = load_settings({**environment, "ML_BACKEND_CONFIG": str(ROOT / "config/default.env")})
    assert settings.label_studio_url == "http://label-studio:8080"
    assert settings.basic_auth is not None
    # The images listen on all addresses, which needs a password: compose sets one.
    load_settings({**environment, "HOST": "0.0.0.0"}).check_exposure()
    cuda = yaml.safe_load((ROOT / "docker/compose.cuda.yaml").read_text())
    assert cuda["services"]["ml-backend"]["build"]["dockerfile"] == "docker/Dockerfile.cuda"
