"""The command ``tsynd train``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from tsynd.cli.options import Data, Device, Options, Quiet, Reading, Track, refuse, takes_options
from tsynd.data.readers.options import ReadOptions
from tsynd.jobs.steps import ClassifierChoice
from tsynd.jobs.train import TrainSettings, train_model

__all__ = ["train"]

_Training = Annotated[
    dict[str, Any], Options(TrainSettings, ("model", "autoencoder", "iterations", "batch_size", "train_size", "seed"))
]
_Networks = Annotated[
    dict[str, Any], Options(TrainSettings, tuple(part.name for part in fields(ClassifierChoice)), "Networks")
]
_ASCENT = ("samples", "steps", "radius", "label_consistency")
_Ascent = Annotated[dict[str, Any], Options(TrainSettings, _ASCENT, "Ascent")]


@takes_options
def train(
    context: typer.Context,
    data: Data,
    output: Annotated[Path, typer.Option(help="New or empty folder, or that of the same training interrupted.")],
    training: _Training,
    ascent: _Ascent,
    networks: _Networks,
    reading: Reading,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    device: Device = None,
    track: Track = None,
    quiet: Quiet = False,
) -> None:
    """Train one model, alone or as one process of torchrun; the same command goes on after an interruption."""
    if training["autoencoder"] is None:
        refuse(context, _ASCENT, "without --autoencoder, which makes the targeted images")
    settings = TrainSettings(**training, **ascent, **networks, reading=ReadOptions(**reading))
    path, loss = train_model(
        data, output, settings, device=device, checkpoint_every=checkpoint_every, progress=not quiet, track=track
    )
    if path is not None:
        typer.echo(f"{settings.iterations} steps, last loss {loss:.4f}, in {path}")
