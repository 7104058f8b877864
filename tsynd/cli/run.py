"""The command ``tsynd run``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tsynd.cli.options import ASCENT, ClassMap, Data, Device, Options, Quiet, Reading, TestData, Track, takes_options
from tsynd.data.external import External
from tsynd.data.readers.options import ReadOptions
from tsynd.jobs import run as job
from tsynd.jobs.steps import NetworkChoice
from tsynd.report.verdict import elsewhere, verdict

__all__ = ["run"]

_Basic = Annotated[dict[str, Any], Options(job.RunSettings, ("train_size", "seed"))]
_Training = Annotated[
    dict[str, Any],
    Options(
        job.RunSettings,
        ("recipe", "flip", "autoencoder_data", "autoencoder_iterations", "iterations", "dropout"),
        "Training",
    ),
]
_Ascent = Annotated[dict[str, Any], Options(job.RunSettings, ASCENT, "Ascent")]
_Networks = Annotated[
    dict[str, Any], Options(job.RunSettings, tuple(part.name for part in fields(NetworkChoice)), "Networks")
]


@takes_options
def run(
    data: Data,
    output: Annotated[Path, typer.Option(help="New or empty folder, or that of the same run interrupted.")],
    basic: _Basic,
    training: _Training,
    ascent: _Ascent,
    networks: _Networks,
    reading: Reading,
    test_data: TestData = None,
    class_map: ClassMap = None,
    device: Device = None,
    track: Track = None,
    quiet: Quiet = False,
) -> None:
    """Train, synthesise, train again with extra images, test both, write a report."""
    settings = job.RunSettings(**basic, **training, **ascent, **networks, reading=ReadOptions(**reading))
    others = External.of(test_data, class_map)
    metrics = job.run(data, output, settings, test_data=others, device=device, progress=not quiet, track=track)
    console = Console()
    for text in [*verdict(metrics["comparison"]), *elsewhere(metrics["elsewhere"])]:
        console.print(text)
    table = Table("balanced accuracy", *metrics["evaluation"])
    for condition in metrics["evaluation"]["real"]:
        own = [scores[condition]["balanced_accuracy"] for scores in metrics["evaluation"].values()]
        table.add_row(condition, *(f"{value:.3f}" for value in own))
    console.print(table)
    made = metrics["synthesis"]
    before, after = made["uncertainty_before"], made["uncertainty_after"]
    console.print(
        f"{made['images']} targeted images: mean uncertainty {before:.4f} → {after:.4f} nats under fresh posterior "
        f"samples, raised for {made['raised_fraction']:.0%}"
    )
    lost = metrics["reconstruction"]["by_class"]
    console.print(
        "autoencoder misses of the variance: " + ", ".join(f"{name} {part:.0%}" for name, part in lost.items())
    )
    console.print(
        f"on new pictures: tsynd predict --classifier {output / 'classifier.safetensors'} --data FOLDER", soft_wrap=True
    )
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)
