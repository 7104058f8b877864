"""The command line; `main` is its entry."""

from tsynd.cli.app import main

__all__ = ["main"]
