"""Cores and memory: those of the control group where one limits them, or else the machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from ml_backend.machine import memory, usable_cores

MIB = 2**20


def _files(root: Path, contents: Mapping[str, str]) -> Path:
    for name, text in contents.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_memory_cgroup_v2_limit_counts_inactive_file_cache_as_available(tmp_path: Path) -> None:
    root = _files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/app\n",
            "sys/fs/cgroup/app/memory.max": f"{64 * MIB}\n",
            "sys/fs/cgroup/app/memory.current": f"{50 * MIB}\n",
            "sys/fs/cgroup/app/memory.stat": f"anon 1\ninactive_file {20 * MIB}\n",
        },
    )
    assert memory(root).total == 64 * MIB
    assert memory(root).available == 34 * MIB


def test_memory_cgroup_v1_limit_is_answered(tmp_path: Path) -> None:
    root = _files(
        tmp_path,
        {
            "proc/self/cgroup": "9:cpuset:/\n4:memory:/docker/abc\n0::/\n",
            # Within a container the mount shows the container's own group.
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{64 * MIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{60 * MIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {4 * MIB}\n",
        },
    )
    assert (memory(root).total, memory(root).available) == (64 * MIB, 8 * MIB)


def test_memory_limit_of_an_ancestor_is_the_smaller_one(tmp_path: Path) -> None:
    root = _files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/app\n",
            "sys/fs/cgroup/pod/memory.max": f"{64 * MIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{10 * MIB}\n",
            "sys/fs/cgroup/pod/app/memory.max": "max\n",
            "sys/fs/cgroup/pod/app/memory.current": f"{MIB}\n",
        },
    )
    assert memory(root).total == 64 * MIB


def test_memory_without_a_cgroup_is_the_machines(tmp_path: Path) -> None:
    assert memory(tmp_path).total == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "100000\n", "cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_usable_cores_quota_of_the_cgroup_is_the_most(
    tmp_path: Path, files: Mapping[str, str], cores: int | None
) -> None:
    version_1 = any("cfs" in name for name in files)
    line, folder = ("1:cpu,cpuacct:/\n", "sys/fs/cgroup/cpu") if version_1 else ("0::/\n", "")
    folder = folder or "sys/fs/cgroup"
    contents = {f"{folder}/{name}": text for name, text in files.items()}
    root = _files(tmp_path, {"proc/self/cgroup": line, **contents})
    assert usable_cores(root) == (cores or len(os.sched_getaffinity(0)))


@pytest.fixture
def limited_cgroup() -> Iterator[Path]:
    """A real memory cgroup of 512 MiB below this process's own; skips where none can be made."""
    mount = Path("/sys/fs/cgroup")
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next(
        (
            (mount / names / path.lstrip("/"), "memory.limit_in_bytes")
            if names == "memory"
            else (mount / path.lstrip("/"), "memory.max")
            for _, names, path in lines
            if names == "memory" or (not names and (mount / "cgroup.controllers").is_file())
        ),
        None,
    )
    if own is None:
        pytest.skip("no memory cgroup is mounted")
    folder, limit = own[0] / f"ml-backend-test-{os.getpid()}", own[1]
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        if not (folder / limit).is_file():
            pytest.skip("the memory controller is not delegated to this cgroup")
        (folder / limit).write_text(str(512 * MIB))
        yield folder
    finally:
        folder.rmdir()


def test_memory_in_a_real_cgroup_is_its_limit(limited_cgroup: Path) -> None:
    script = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
        "from ml_backend.machine import memory; print(memory().total, memory().available)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(limited_cgroup / "cgroup.procs")],
        capture_output=True,
        text=True,
        check=True,
    )
    total, available = map(int, done.stdout.split())
    assert total == 512 * MIB
    assert 0 < available < total
