"""The disk cache: its limit, the order of deletion, and concurrent use."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ml_backend.label_studio.disk_cache import DiskCache


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _let_time_pass(folder: Path) -> None:
    """Dates all files back by ten seconds."""
    for path in folder.glob("*/*"):
        moment = path.stat().st_mtime - 10
        os.utime(path, (moment, moment))


def test_disk_cache_many_files_stays_below_its_limit(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for number in range(100):
        cache.put(f"image {number}", bytes(700))
        assert _size(tmp_path) <= 10_000
    assert cache.get("image 99") == bytes(700)
    # A sweep does not delete everything.
    assert _size(tmp_path) > 5_000


def test_disk_cache_two_caches_in_one_folder_stay_near_the_limit(tmp_path: Path) -> None:
    caches = [DiskCache(tmp_path, 10_000) for _ in range(2)]
    for number in range(100):
        caches[number % 2].put(f"image {number}", bytes(300))
        assert _size(tmp_path) <= 12_000


def test_disk_cache_files_of_an_earlier_process_count_towards_the_limit(tmp_path: Path) -> None:
    earlier = DiskCache(tmp_path, 100_000)
    for number in range(20):
        earlier.put(f"image {number}", bytes(1_000))
    DiskCache(tmp_path, 5_000).put("new", bytes(1_000))
    assert _size(tmp_path) <= 5_000


def test_disk_cache_over_its_limit_deletes_the_least_recently_read_files(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for number in range(9):
        cache.put(f"image {number}", bytes(1_000))
        _let_time_pass(tmp_path)
    for number in range(3):
        assert cache.get(f"image {number}") == bytes(1_000)
    _let_time_pass(tmp_path)
    for number in range(9, 12):
        cache.put(f"image {number}", bytes(1_000))
    kept = {number for number in range(12) if cache.get(f"image {number}") is not None}
    assert kept >= {0, 1, 2, 9, 10, 11}
    assert kept.isdisjoint({3, 4})


def test_disk_cache_file_above_the_limit_is_not_stored_and_deletes_no_other(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1_000)
    cache.put("small", bytes(500))
    cache.put("large", bytes(1_001))
    assert cache.get("large") is None
    assert cache.get("small") == bytes(500)


def test_disk_cache_second_put_of_a_key_replaces_the_content(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1_000)
    cache.put("a", b"old")
    cache.put("a", b"new")
    assert cache.get("a") == b"new"
    assert cache.get("b") is None


def test_disk_cache_concurrent_threads_never_read_a_part_of_a_file(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 50_000)
    damaged: list[str] = []

    def work(seed: int) -> None:
        for step in range(60):
            letter = chr(ord("a") + (seed * 7 + step) % 20)
            found = cache.get(letter)
            if found is not None and found != letter.encode() * 5_000:
                damaged.append(letter)
            cache.put(letter, letter.encode() * 5_000)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert damaged == []
    assert _size(tmp_path) <= 50_000
