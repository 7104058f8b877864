"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="MedMNIST-style .npz, folder of class folders, MedMNIST name (pneumoniamnist, ...), 'phantom' or"
        " 'phantom3d'.",
    ),
]
TrainSize = Annotated[int | None, typer.Option(help="Labelled training images; all by default.")]
Seed = Annotated[int, typer.Option(help="Of the subset, the networks and the posterior samples.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one.")]
Objective = Annotated[str, typer.Option(help="mutual_information or entropy.")]
Samples = Annotated[int, typer.Option(help="Posterior samples T.")]
Masks = Annotated[str, typer.Option(help="shared or independent dropout masks.")]
Steps = Annotated[int, typer.Option(help="Ascent steps K.")]
Radius = Annotated[float, typer.Option(help="Of the ball, times latent deviation times sqrt(dimension).")]
Consistency = Annotated[float | None, typer.Option(help="Least mean probability that the source label must keep.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
