"""The structure of the program: imports point one way, rooms and files stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ml_backend

ROOT = Path(ml_backend.__file__).parent
LAYERS = (
    # The ground.
    {"extensions", "machine", "reasons"},
    {"settings"},
    {"store", "detection"},
    {"label_studio", "remedies"},
    # The loop.
    {"datasets"},
    {"projects"},
    {"jobs"},
    {"acquisition"},
    {"training"},
    {"simulation"},
    {"audits"},
    {"serving"},
    {"doctor"},
    {"worker"},
    # Composes.
    {"backend"},
    # The doors.
    {"wording"},
    {"model", "programs", "http"},
    {"adapter", "cli", "demo"},
)
"""From the ground to the doors: a module imports its own room and lower layers, nothing else."""
LARGEST_ROOM = 0.2
"""Share of the program's lines that one room may hold."""
LONGEST_FILE = 400
"""Lines of a file."""
LONGER: dict[str, str] = {}
"""Files that are longer, and the reason for each."""


def _files() -> list[Path]:
    return [file for file in sorted(ROOT.rglob("*.py")) if "migrations" not in file.parts]


def _room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def _module(file: Path) -> str:
    return ".".join(("ml_backend", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ml_backend"):
            for name in node.names:
                yield f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("ml_backend."))


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_imports_of_every_module_point_to_lower_layers() -> None:
    level = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    checked = 0
    for file in _files():
        room = _room(file)
        if room == "__init__":
            continue
        for imported in _imports(file):
            other = imported.split(".")[1]
            if other not in level or other == room:
                # `from ml_backend import __version__`, or its own room.
                continue
            checked += 1
            assert level[other] < level[room], f"{file.relative_to(ROOT)} imports {imported}"
    assert checked > 200


def test_imports_between_modules_form_no_circle() -> None:
    modules = {_module(file): file for file in _files()}
    below: dict[str, set[str]] = {}
    for name, file in modules.items():
        below[name] = set()
        for imported in _imports(file):
            target = imported if imported in modules else imported.rpartition(".")[0]
            if target in modules and target != name:
                below[name].add(target)

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for other in sorted(below[name]):
            visit(other, (*path, name))
        done.add(name)

    done: set[str] = set()
    for name in sorted(modules):
        visit(name, ())


def test_every_room_holds_at_most_a_fifth_of_the_program() -> None:
    rooms: dict[str, int] = {}
    for file in _files():
        rooms[_room(file)] = rooms.get(_room(file), 0) + _lines(file)
    total = sum(rooms.values())
    for room, lines in rooms.items():
        assert lines <= LARGEST_ROOM * total, f"{room} holds {lines / total:.0%} of the program"


def test_every_file_is_short_or_has_a_reason_to_be_long() -> None:
    long = {f.relative_to(ROOT).as_posix() for f in _files() if _lines(f) > LONGEST_FILE}
    assert long == set(LONGER)
