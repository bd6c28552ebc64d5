"""Imports point one way, from the doors to the ground (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ml_backend

ROOT = Path(ml_backend.__file__).parent
BELOW = {
    "settings": set[str](),
    "store": {"settings"},
    "detection": {"settings", "store"},
    "label_studio": {"settings", "store"},
    "learning": {"settings", "store", "detection", "label_studio"},
    "backend": {"settings", "store", "detection", "label_studio", "learning"},
}
"""What each part may import besides itself; those that are not listed are doors."""
COMPOSED = ("learning/autolabel_process.py", "learning/training_process.py")
"""Processes of their own: they ask the one place that composes."""


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ml_backend."):
            yield str(node.module).split(".")[1]


def test_imports_point_downwards() -> None:
    checked = 0
    for file in ROOT.rglob("*.py"):
        name = file.relative_to(ROOT)
        part = name.parts[0].removesuffix(".py")
        if part not in BELOW or name.as_posix() in COMPOSED:
            continue
        for imported in _imports(file):
            checked += 1
            assert imported in BELOW[part] | {part}, f"{name} imports ml_backend.{imported}"
    assert checked > 50
