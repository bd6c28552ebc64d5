"""Writes the output of commands: two consoles, errors, JSON, and common cells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

# Emoji codes in texts of users stay as written; callers put `escape` around such texts.
out = Console(emoji=False)
err = Console(emoji=False, stderr=True)


def fail(message: str) -> typer.Exit:
    """Prints an error; returns the exit with status 1, for the caller to raise."""
    err.print(f"[red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    return typer.Exit(1)


def say_wrong(what: str, error: Exception) -> None:
    """Prints which setting or option is wrong.

    Args:
        what: `setting` or `option`.
        error: its text names the setting or option.
    """
    err.print(f"[red]wrong {what}:[/] {escape(str(error))}", soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Prints a value as JSON; dates and other unknown types as their text."""
    print(json.dumps(value, indent=1, default=str))


def ap50_words(card: Mapping[str, Any]) -> str:
    """Formats a model card's AP50 with its interval."""
    metrics = card["metrics"]
    interval = metrics["map50_interval"]
    return f"{metrics['map50']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"
