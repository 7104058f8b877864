"""The command ``tsynd pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tsynd.cli.options import Quiet
from tsynd.distributed.pack import pack as pack_shards

__all__ = ["pack"]


def pack(
    shards: Annotated[Path, typer.Argument(help="Folder of a finished sharded synthesis.")],
    output: Annotated[Path, typer.Option(help="New .npz file, or new folder for class folders of PNG.")],
    quiet: Quiet = False,
) -> None:
    """Turn shards into one MedMNIST-style .npz or into class folders."""
    count = pack_shards(shards, output, progress=not quiet)
    typer.echo(f"{count} images, in {output}")
