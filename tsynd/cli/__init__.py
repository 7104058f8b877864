"""The command line; `main` is its entry."""

from tsynd.cli.commands import app, main

__all__ = ["app", "main"]
