"""The command ``tsynd push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tsynd.jobs import publish

__all__ = ["push"]


def push(
    run: Annotated[Path, typer.Option(help="Folder of a finished tsynd run.")],
    repo: Annotated[str, typer.Option(help="USER/NAME on the Hugging Face hub; made where it is not there.")],
    what: Annotated[str, typer.Option(help="images (a data set) or classifier (a model).")] = "images",
    public: Annotated[bool, typer.Option("--public", help="For all to see; private otherwise.")] = False,
) -> None:
    """Put a run's synthetic images or its classifier on the Hugging Face hub, with a card of where they come from."""
    typer.echo(publish.push(run, repo, what, private=not public))
