"""Defines the options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ProjectOption = Annotated[
    str,
    typer.Option("--project", "-p", help="The project's id, or its key where several have the id."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
