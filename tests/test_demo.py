"""`make demo` starts, connects its project, and goes on with it at the next start."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import label_studio_program, prepared_label_studio


def test_demo_started_twice_goes_on_with_its_project(
    label_studio_cache: Path, tmp_path: Path
) -> None:
    # A migrated database saves half a minute; the demo adds its own user and project.
    shutil.copytree(prepared_label_studio(label_studio_cache), tmp_path / "demo/label-studio")
    command = [
        *(sys.executable, "-m", "ml_backend.demo", "--exit-when-ready"),
        *("--label-studio", str(label_studio_program()), "--data", str(tmp_path / "demo")),
    ]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "ready" in first.stdout
    assert re.search(r"http://127\.0\.0\.1:\d+/projects/1/data", first.stdout)
    assert "password" in first.stdout
    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "the connection was there" in second.stdout
    assert "making a project" not in second.stdout
