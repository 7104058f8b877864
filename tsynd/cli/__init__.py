"""The command line; `main` is its entry."""

from tsynd.cli.app import app, main

__all__ = ["app", "main"]
