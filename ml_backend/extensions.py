"""The four kinds of things that can be added: presets, strategies, controls and dataset formats.

Each kind is a registry of names. To add one to this program, write one file and name it below. To
add one from another package, declare an entry point in the group of the registry:

    [project.entry-points."ml_backend.strategies"]
    committee = "my_package.committee:Committee"

Nothing is imported before it is asked for, so that settings can be checked against the names
without loading PyTorch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any


class UnknownExtension(LookupError):
    """No extension has this name; the text lists the names that exist."""


class ExtensionError(ValueError):
    """An extension cannot be imported; the text names it, its import path and the cause."""


class Registry:
    """Names of one kind of extension, with the import path of each.

    Args:
        kind: what is registered, as messages call it: `preset`, `strategy`, ...
        group: the entry-point group in which packages register theirs.
        builtin: import paths, `package.module:attribute`, by name.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)

    @functools.cached_property
    def paths(self) -> Mapping[str, str]:
        """Import paths by name: the built-in ones, then those of installed packages."""
        declared = {e.name: e.value for e in entry_points(group=self.group)}
        # In this order, and a built-in one keeps its name: `check` tells of the other.
        return self._builtin | declared | self._builtin

    def __contains__(self, name: object) -> bool:
        return name in self.paths

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def load(self, name: str) -> Any:
        """Imports an extension.

        Raises:
            UnknownExtension: no extension has this name.
            ExtensionError: it cannot be imported.
        """
        path = self.paths.get(name)
        if path is None:
            raise UnknownExtension(
                f"there is no {self.kind} {name!r}: it must be one of {', '.join(self)}"
            )
        return load_path(self.kind, path)

    def check(self) -> None:
        """Imports every extension that another package has declared.

        Raises:
            ExtensionError: one of them cannot be imported, or has the name of a built-in one.
        """
        for entry in entry_points(group=self.group):
            package = entry.dist.name if entry.dist is not None else "unknown"
            if entry.name in self._builtin:
                raise ExtensionError(
                    f"the {self.kind} {entry.name!r} of the package {package} has the name of a "
                    "built-in one: rename it there, or uninstall the package"
                )
            try:
                _import(entry.value)
            except Exception as error:
                raise ExtensionError(
                    f"the {self.kind} {entry.name!r} of the package {package} cannot be imported "
                    f"from {entry.value} ({_cause(error)}): repair the package, or uninstall it"
                ) from error


def check_extensions() -> None:
    """Imports what other packages have declared; without such a package, nothing is imported.

    A server does this at its start, since a control that cannot be imported would make every label
    config fail.

    Raises:
        ExtensionError: an extension cannot be used; the text names it and its package.
    """
    for registry in (PRESETS, STRATEGIES, CONTROLS, DATASET_FORMATS):
        registry.check()


def load_path(kind: str, path: str) -> Any:
    """Imports `package.module:attribute`.

    Args:
        kind: what it is, for messages.
        path: the import path.

    Raises:
        ExtensionError: the module or the attribute cannot be imported.
    """
    try:
        return _import(path)
    except Exception as error:
        raise ExtensionError(
            f"the {kind} {path!r} cannot be imported ({_cause(error)}): install its package, or "
            "put its folder into PYTHONPATH"
        ) from error


def _import(path: str) -> Any:
    """Imports `package.module:attribute`; another package's module may raise anything."""
    module, _, attribute = path.partition(":")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


def _cause(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


PRESETS = Registry(
    "preset",
    "ml_backend.presets",
    {
        "lite": "ml_backend.detection.presets.lite:PRESET",
        "tiny": "ml_backend.detection.presets.tiny:PRESET",
        "small": "ml_backend.detection.presets.small:PRESET",
        "accurate": "ml_backend.detection.presets.accurate:PRESET",
    },
)
STRATEGIES = Registry(
    "strategy",
    "ml_backend.strategies",
    {
        "diverse": "ml_backend.acquisition.strategies.diverse:Diverse",
        "uncertainty": "ml_backend.acquisition.strategies.uncertainty:Uncertainty",
        "random": "ml_backend.acquisition.strategies.random:Random",
    },
)
CONTROLS = Registry(
    "control",
    "ml_backend.controls",
    {
        "rectanglelabels": ("ml_backend.label_studio.controls.rectangle_labels:RectangleLabels"),
        "rectangle": "ml_backend.label_studio.controls.rectangle:Rectangle",
    },
)
# In the order in which a folder is looked through: the first format that recognises it reads it.
DATASET_FORMATS = Registry(
    "dataset format",
    "ml_backend.dataset_formats",
    {
        "coco": "ml_backend.datasets.formats.coco:Coco",
        "label_studio": "ml_backend.datasets.formats.label_studio:LabelStudioExport",
        "yolo": "ml_backend.datasets.formats.yolo:Yolo",
        "pascal_voc": "ml_backend.datasets.formats.pascal_voc:PascalVoc",
    },
)
