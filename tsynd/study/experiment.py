"""A study: every arm trained and tested at every size and seed, in parallel processes, resumable cell by cell."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tsynd.data.dataset import DataSource
from tsynd.data.load import load_data
from tsynd.evaluation.attacks import check_robustness
from tsynd.jobs.job import Job
from tsynd.models.checkpoint import read_card
from tsynd.study.arms import parse_arm
from tsynd.study.cell import run_cell, train_autoencoder
from tsynd.study.scheduler import _Progress, _Task, _work
from tsynd.study.settings import (
    Cell,
    StudySettings,
    Workplace,
    autoencoder_path,
    cell_path,
    cells_of,
    check_study,
    classifier_path,
    read_samples,
)
from tsynd.study.study_report import write_study
from tsynd.utils.atomic import atomic_path, clear_leftovers
from tsynd.utils.device import resolve_device
from tsynd.utils.errors import InputError, check_whole, require
from tsynd.utils.fingerprint import fingerprint, hash_file, read_sealed
from tsynd.utils.progress import progress_bar, say
from tsynd.utils.version import __version__

__all__ = ["experiment"]

_NEEDED = {
    "monai.networks.nets": "models",
    "safetensors.torch": "models",
    "accelerate": "train",
    "torchmetrics": "train",
    "kornia": "train",
    "PIL": "data",
    "matplotlib.figure": "cli",
    "scipy.stats": "robustness",
}


def experiment(
    data: str | Path,
    output: str | Path,
    train_sizes: Sequence[int],
    seeds: int,
    arms: Sequence[str],
    settings: StudySettings | None = None,
    *,
    workers: int | None = None,
    device: str | None = None,
    progress: bool = True,
    report: bool = True,
) -> list[dict[str, Any]]:
    """Run a study and write its report; see ``docs/experiment.md`` for the files and what is measured.

    All arms of a size and seed share the labelled subset, the first weights, the batch order, the number of
    optimiser steps and the autoencoder. A study that was interrupted goes on behind its last finished cells when
    started again; sizes, seeds and arms may be added to a finished one.

    Args:
        data: anything :func:`tsynd.load_data` takes.
        output: a new or empty folder, or that of the same study.
        train_sizes: labelled training images, one or more sizes.
        seeds: how many; they are 0, 1, ...
        arms: see :func:`tsynd.study.arms.parse_arm`; ``real`` is always there.
        settings: see :class:`StudySettings`.
        workers: processes; by default one per core on a CPU and one on a GPU. On a CPU each has one thread: that is
            faster than fewer processes with more, and results do not depend on the number of either.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; None takes a GPU where there is one.
        progress: show a bar where rich is installed.
        report: write ``report.html`` and ``results.md`` too.

    Returns:
        What every finished cell in the folder measured.

    Raises:
        InputError: an argument, the data or the output folder cannot be used; raised before training starts.
        MissingExtraError: a package is not installed.
    """
    settings = settings or StudySettings()
    check_whole("workers", workers, optional=True)
    cells = cells_of(train_sizes, seeds, arms)
    for module, extra in _NEEDED.items():  # now, not after the training
        require(module, extra)
    if settings.attacks:
        check_robustness()
    where = str(resolve_device(device))
    for size in dict.fromkeys(train_sizes):  # refuses one that is too small or too large
        source = load_data(data, train_size=size, **settings.reading.given())
    check_study(settings, source, [parse_arm(arm) for arm in arms])
    whole = load_data(data, **settings.reading.given())
    say(whole.summary.lines(), progress)
    content = [x for part in (whole.unlabelled, whole.val, whole.test) for x in (part.images, part.labels)]
    with Job(Path(output).expanduser(), fingerprint(settings, content, kind="experiment")) as job:
        for folder in job.folder.iterdir():  # models/, cells/, ...
            clear_leftovers(folder)
        place = Workplace(str(data), job.folder, settings, where)
        results, facts = _measure(job, place, source, cells, workers, progress)
        if report:
            write_study(place, results, facts)
    return results


def _measure(
    job: Job, place: Workplace, source: DataSource, cells: Sequence[Cell], workers: int | None, progress: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run what is left of the cells; all results, and what is to be known of data and machine."""
    where, settings = place.device, place.settings
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers or (1 if where.startswith("cuda") else cores)
    tasks = _plan(place, cells)
    with progress_bar("cells", len(cells), progress) as report:
        threads = None if where.startswith("cuda") else 1
        _work(tasks, min(count, max(len(tasks), 1)), threads, _Progress(report, len(cells), tasks))
    job.check_folder()
    results = read_cells(place.folder)
    with atomic_path(place.folder / "results.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in results), encoding="utf-8")
    facts = {
        "version": __version__,
        "data": source.name,
        "task": source.task,
        "class_names": list(source.class_names),
        "image_shape": list(source.image_shape),
        "tested": len(getattr(source, settings.split)),
        "device": where,
        "workers": str(count),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name(where) if where.startswith("cuda") else platform.machine(),
    }
    return results, facts


@dataclass(frozen=True)
class _Autoencoder:
    """Picklable work: train an autoencoder."""

    place: Workplace
    size: int
    seed: int

    def __call__(self) -> None:
        train_autoencoder(self.place, self.size, self.seed)


@dataclass(frozen=True)
class _RunCell:
    """Picklable work: run a cell."""

    place: Workplace
    cell: Cell

    def __call__(self) -> None:
        run_cell(self.place, self.cell)


def _plan(place: Workplace, cells: Sequence[Cell]) -> list[_Task]:
    """What is left to do, in a good order: size by size and seed by seed, what others wait for first."""
    tasks: dict[str, _Task] = {}
    for cell in cells:
        if _finished(place, cell):
            continue
        needs = []
        arm = parse_arm(cell.arm)
        if arm.generative:
            path = autoencoder_path(place, cell.size, cell.seed)
            if not _whole(path):
                work = _Autoencoder(place, cell.size, cell.seed)
                tasks.setdefault(path.name, _Task(path.name, work, is_cell=False))
                needs.append(path.name)
            real = Cell(cell.size, cell.seed, "real")
            if real.name in tasks:
                needs.append(real.name)
        tasks[cell.name] = _Task(cell.name, _RunCell(place, cell), tuple(needs))
    return list(tasks.values())


def _finished(place: Workplace, cell: Cell) -> bool:
    if read_sealed(cell_path(place, cell)) is None or not _whole(classifier_path(place, cell)):
        return False
    return not parse_arm(cell.arm).generative or read_samples(place, cell) is not None


def _whole(weights: Path) -> bool:
    """Whether a model's two files are there and belong together."""
    try:
        return read_card(weights).sha256 == hash_file(weights)
    except (InputError, OSError):
        return False


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The results of all finished cells of a study's folder, by size, seed and arm."""
    found = [read_sealed(path) for path in (folder / "cells").glob("[!.]*.json")]
    rows = [{key: value for key, value in row.items() if key != "digest"} for row in found if row]
    return sorted(rows, key=lambda row: (row["size"], row["seed"], row["arm"]))
