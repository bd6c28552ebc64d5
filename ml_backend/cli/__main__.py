"""Runs a command: `python -m ml_backend.cli`."""

from ml_backend.cli.app import main

main()
