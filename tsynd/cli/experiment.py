"""The command ``tsynd experiment``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tsynd.cli.options import Data, Device, Options, Quiet, Reading, refuse, takes_options
from tsynd.data.readers.options import ReadOptions
from tsynd.jobs.steps import NetworkChoice
from tsynd.study import experiment as study
from tsynd.study.settings import DEFAULT_ARMS, StudySettings

__all__ = ["LISTS", "experiment"]

LISTS = ("--train-size", "--arms", "--conditions", "--attacks")
"""Options that take several values behind one flag."""

_NETWORKS = tuple(part.name for part in fields(NetworkChoice))
_TRAINING = (
    "autoencoder_data",
    "autoencoder_iterations",
    "autoencoder_widths",
    "latent_channels",
    "iterations",
    "batch_size",
    "learning_rate",
    "dropout",
    "dropout_rate",
    "augmentation_weight",
    "warmup_fraction",
)
_IMAGES = (
    "samples",
    "masks",
    "steps",
    "radius",
    "step_size",
    "rule",
    "label_consistency",
    "ratio",
    "every",
    "adversarial_budget",
    "adversarial_steps",
)
_TEST = ("split", "conditions", "attacks", "attack_images", "query_images", "queries", "uncertainty_samples")


@dataclass(frozen=True)
class _Cells:
    """What is trained.

    Attributes:
        seeds: how many; they are 0, 1, ...
        arms: ``real``, standard, randaugment, adversarial, trades, reconstruction, random, entropy, mutual_information,
            expected_information, loss, two in turn as trades+entropy, recipe; with own options as entropy,radius=1.0.
    """

    seeds: int = 5
    arms: tuple[str, ...] = DEFAULT_ARMS


@takes_options
def experiment(
    context: typer.Context,
    data: Data,
    output: Annotated[Path, typer.Option(help="New or empty folder, or that of the same study.")],
    train_size: Annotated[list[int], typer.Option(help="Labelled training images, one or more sizes.")],
    cells: Annotated[dict[str, Any], Options(_Cells, ("seeds", "arms"))],
    training: Annotated[dict[str, Any], Options(StudySettings, (*_TRAINING, *_NETWORKS), "Training")],
    images: Annotated[dict[str, Any], Options(StudySettings, _IMAGES, "Extra images")],
    test: Annotated[dict[str, Any], Options(StudySettings, _TEST, "Test")],
    reading: Reading,
    workers: Annotated[
        int | None, typer.Option(help="Processes; one per core on a CPU, one on a GPU.", rich_help_panel="Training")
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train and test all arms with paired seeds and equal steps, and report whether targeting helped."""
    test["conditions"] = tuple(test["conditions"])
    test["attacks"] = () if test["attacks"] == ["none"] else tuple(test["attacks"])
    if not test["attacks"]:
        refuse(context, ("attack_images", "query_images", "queries"), "without attacks")
    for name in ("attack_images", "query_images"):
        test[name] = test[name] or None
    settings = StudySettings(**training, **images, **test, reading=ReadOptions(**reading))
    rows = study.experiment(
        data, output, train_size, **cells, settings=settings, workers=workers, device=device, progress=not quiet
    )
    _print_study(rows, output)


def _print_study(rows: list[dict[str, Any]], output: Path) -> None:
    from tsynd.study.score_tables import difference_tables, score_table
    from tsynd.study.summary import sizes_of

    console = Console()
    for table in [*(score_table(rows, size, brief=True) for size in sizes_of(rows)), *difference_tables(rows)]:
        shown = Table(*(text.replace("\u00ad", "") for text in table.head), title=table.title)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)
