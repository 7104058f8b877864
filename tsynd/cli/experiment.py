"""The command ``tsynd experiment``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tsynd.cli.options import Data, Options, Quiet, Reading, refuse, takes_options
from tsynd.data.external import External
from tsynd.data.readers.options import ReadOptions
from tsynd.jobs.steps import NetworkChoice
from tsynd.study import experiment as study
from tsynd.study.settings import DEFAULT_ARMS, StudySettings
from tsynd.utils.errors import InputError

__all__ = ["LISTS", "experiment"]

LISTS = ("--train-size", "--arms", "--conditions", "--attacks", "--metrics", "--test-data", "--class-map")
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
    "base",
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
        seeds: how many, or which, as 1,2,3.
        arms: ``real``, standard, randaugment, adversarial, trades, reconstruction, random, entropy, mutual_information,
            expected_information, loss, recipe, MODULE:FUNCTION; in turn: trades+entropy; options: entropy,radius=1.
    """

    seeds: str = "5"
    arms: tuple[str, ...] = DEFAULT_ARMS


@dataclass(frozen=True)
class _Later:
    """What is scored without training, in finished studies too.

    Attributes:
        metrics: scores of your own, each as MODULE:FUNCTION; may be added to a finished study.
        test_data: NAME=DATA, more test sets, as of other hospitals; may be added to a finished study.
        class_map: THEIRS=OURS, their classes by the data's names; THEIRS= leaves one out.
    """

    metrics: tuple[str, ...] = ()
    test_data: tuple[str, ...] = ()
    class_map: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Machine:
    """Where it is computed.

    Attributes:
        workers: processes; one per core on a CPU, one on a GPU.
        device: ``cpu``, cuda, cuda:1, ...; a GPU where there is one.
    """

    workers: int | None = None
    device: str | None = None


@takes_options
def experiment(
    context: typer.Context,
    data: Data,
    output: Annotated[Path, typer.Option(help="New or empty folder, or that of the same study.")],
    train_size: Annotated[list[int], typer.Option(help="Labelled images, one or more sizes.")],
    cells: Annotated[dict[str, Any], Options(_Cells, ("seeds", "arms"))],
    later: Annotated[dict[str, Any], Options(_Later, ("metrics", "test_data", "class_map"), "Test")],
    machine: Annotated[dict[str, Any], Options(_Machine, ("workers", "device"), "Training")],
    training: Annotated[dict[str, Any], Options(StudySettings, (*_TRAINING, *_NETWORKS), "Training")],
    images: Annotated[dict[str, Any], Options(StudySettings, _IMAGES, "Extra images")],
    test: Annotated[dict[str, Any], Options(StudySettings, _TEST, "Test")],
    reading: Reading,
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
    seeds = _seeds(cells.pop("seeds"))
    elsewhere = External.of(later["test_data"], later["class_map"])
    rows = study.experiment(
        data,
        output,
        train_size,
        seeds,
        **cells,
        metrics=later["metrics"],
        settings=settings,
        test_data=elsewhere,
        **machine,
        progress=not quiet,
    )
    _print_study(rows, output)


def _seeds(text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise InputError(f"seeds: got {text!r}, wanted how many, or which, as 1,2,3")
    return numbers if "," in text else numbers[0]


def _print_study(rows: list[dict[str, Any]], output: Path) -> None:
    from tsynd.study.score_tables import score_table
    from tsynd.study.study_report import lead
    from tsynd.study.summary import sizes_of

    console = Console()
    for table in (score_table(rows, size, brief=True) for size in sizes_of(rows)):
        shown = Table(*(text.replace("\u00ad", "") for text in table.head), title=table.title)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for text in lead(rows):
        console.print(text)
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)
