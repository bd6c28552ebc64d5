"""Progress of long commands: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from ml_backend.cli.progress import ProgressReporter


def _shown(*, terminal: bool, line_every: float) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, emoji=False)
    with ProgressReporter(console, line_every=line_every) as progress:
        progress.update(0.0, "decoding the images")
        progress.update(0.25, "10 images labelled; [1/2] training")
        progress.update(0.25, "10 images labelled; [1/2] training")
        progress.milestone("training after 10 images")
        progress.message("no worker has taken the job yet")
        progress.update(1.0, "done")
    return output.getvalue()


def test_progress_without_terminal_prints_first_update_milestones_and_messages() -> None:
    assert _shown(terminal=False, line_every=3600).splitlines() == [
        "  0% decoding the images",
        "training after 10 images",
        "no worker has taken the job yet",
    ]


def test_progress_without_terminal_prints_each_new_update_once_its_time_has_come() -> None:
    assert _shown(terminal=False, line_every=0).splitlines() == [
        "  0% decoding the images",
        " 25% 10 images labelled; [1/2] training",
        "training after 10 images",
        "no worker has taken the job yet",
        "100% done",
    ]


def test_progress_on_terminal_shows_a_bar_and_messages_alone() -> None:
    shown = _shown(terminal=True, line_every=0)
    assert "\x1b[" in shown
    assert "done" in shown
    assert "no worker has taken the job yet" in shown
    assert "training after 10 images" not in shown
