"""Run work in a process of its own that kills itself at a given step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests
import torch
from sqlalchemy.engine.default import DefaultDialect

from ml_backend.detection import detector
from ml_backend.jobs.jobs import Jobs

_WITHIN = 120

# Children of a fork server start with all modules imported.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.steps", "tests.job_process", "ml_backend.http.app"])


class Steps:
    """Run work in a process that kills itself at one of its steps.

    A step is the moment before or after a call with a lasting effect: a write, fsync, rename,
    commit, checkpoint of a job or HTTP request.

    Args:
        settings: environment variables of the process.
        work: runs in the process; an integer that it returns is the exit status.
    """

    def __init__(
        self,
        settings: Mapping[str, str],
        work: Callable[..., object],
    ) -> None:
        self._settings = dict(settings)
        self._work = work

    def count(self, *arguments: object, status: int = 0) -> int:
        """Run the work to its end and check its exit status; return its number of steps."""
        taken = _processes.RawValue("i", 0)
        assert self._run(0, taken, arguments) == status
        return int(taken.value)

    def killed_at(self, step: int, *arguments: object) -> bool:
        """Kill the work at a step; return whether it reached the step."""
        code = self._run(step, _processes.RawValue("i", 0), arguments)
        assert code in (0, 3, -signal.SIGKILL), code
        return code == -signal.SIGKILL

    def _run(self, step: int, taken: Any, arguments: tuple[object, ...]) -> int | None:
        process = _processes.Process(
            target=_die_at, args=(step, taken, self._settings, self._work, arguments)
        )
        process.start()
        process.join(_WITHIN)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"the work hangs after step {taken.value}, killed at {step}")
        return process.exitcode


def _die_at(
    step: int,
    taken: Any,
    settings: Mapping[str, str],
    work: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    turn = threading.Lock()

    def count() -> None:
        with turn:
            taken.value += 1
            if taken.value == step:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(of: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            count()
            answer = of(*args, **kwargs)
            count()
            return answer

        return called

    for owner, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (Path, "write_text"),
        (detector, "save_file"),
        (DefaultDialect, "do_commit"),
        # One statement that is a transaction by itself is not committed.
        (Jobs, "advance"),
        (requests.Session, "send"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    # The lowest priority would only make the test slower.
    os.nice = lambda _: 0
    os.environ.update(settings)
    torch.set_num_threads(1)
    raise SystemExit(work(*arguments))
