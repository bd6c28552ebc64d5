"""Shows how far a long command is, on standard error: a bar on a terminal, lines elsewhere.

Standard output stays free for the command's answer, JSON for example.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

LINE_EVERY = 60.0
"""Seconds between two lines about a stage that has no end yet, where there is no terminal."""


class ProgressReporter:
    """Reports progress; used as a context manager, whose end removes nothing from the output.

    rich draws nothing where the output is no terminal (a pipe, a log file, a container), so that a
    command would be silent for hours. There, lines are printed instead.

    Args:
        console: receives the output, standard error as a rule.
        line_every: seconds between two lines of `update` where there is no terminal.
    """

    def __init__(self, console: Console, *, line_every: float = LINE_EVERY) -> None:
        self._console = console
        self._line_every = line_every
        self._next_line = 0.0
        self._last_line = ""
        self._bar = Progress(console=console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=1.0) if self._bar is not None else None

    def __enter__(self) -> ProgressReporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, fraction: float, words: str) -> None:
        """Tells the fraction done, in `[0, 1]`, and the present stage; may be called often.

        Without a terminal, prints a line at the first call, and then at most one in `line_every`
        seconds.
        """
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=fraction, description=escape(words))
            return
        line = f"{fraction:4.0%} {words}"
        if time.monotonic() >= self._next_line and line != self._last_line:
            self._print(line)
            self._last_line = line

    def milestone(self, words: str) -> None:
        """Tells that a stage has ended; printed at once without a terminal, not beside a bar."""
        if self._bar is None:
            self._print(words)

    def message(self, words: str) -> None:
        """Prints a line that everybody should read, above the bar on a terminal."""
        self._print(words)

    def _print(self, words: str) -> None:
        self._next_line = time.monotonic() + self._line_every
        self._console.print(escape(words), soft_wrap=True, highlight=False)
