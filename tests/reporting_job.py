"""Stands in for the program of a job: sends reports for given times, then ends the job.

The supervisor starts it as `python -m tests.reporting_job KIND JOB CLAIM PARENT PIPE PREPARED`.
PREPARED holds `stages`: for each a code, the seconds that its reports are sent for, and whether
they differ.
"""

from __future__ import annotations

import json
import os
import sys
import time

EVERY = 0.2
"""Seconds between two reports."""
END = "all stages are over"
"""Text of the reason with which the job fails after its last stage."""


def main(pipe: int, stages: list[tuple[str, float, bool]]) -> None:
    """Send the reports of all stages, and the end."""
    number = 0
    for code, seconds, differ in stages:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            number += differ
            why = {"code": code, "values": {"number": number}}
            _send(pipe, {"type": "progress", "fraction": 0.5, "reason": why})
            time.sleep(EVERY)
    ended = {"code": "plain", "values": {"text": END}}
    _send(pipe, {"type": "end", "outcome": "failed", "reason": ended})


def _send(pipe: int, report: dict[str, object]) -> None:
    os.write(pipe, json.dumps(report).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[5]), json.loads(sys.argv[6])["stages"])
