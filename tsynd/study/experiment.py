"""A study: every arm trained and tested at every size and seed, in parallel processes, resumable cell by cell."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tsynd.data.dataset import DataSource, LabelledImages
from tsynd.data.external import External
from tsynd.data.load import load_data
from tsynd.evaluation.attacks import check_robustness, parse_attacks
from tsynd.evaluation.evaluate import predictions
from tsynd.evaluation.metrics import scores
from tsynd.jobs.job import Job
from tsynd.models.checkpoint import load_model, read_card
from tsynd.study.arms import parse_arm
from tsynd.study.cell import plain, run_cell, train_autoencoder
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
    predictions_path,
    read_arrays,
    samples_path,
)
from tsynd.study.study_report import write_study
from tsynd.utils.atomic import atomic_path, clear_leftovers, save_npz
from tsynd.utils.calls import call_of, name_of
from tsynd.utils.device import resolve_device
from tsynd.utils.errors import InputError, check_whole, require
from tsynd.utils.fingerprint import fingerprint, hash_file, hash_parts, read_sealed
from tsynd.utils.progress import progress_bar, say
from tsynd.utils.settings import override
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


Named: TypeAlias = str | Callable[..., Any]
"""A text, or a function or class at the top of a module, which stands for its MODULE:FUNCTION."""

_NAMED = ("classifier", "autoencoder", "base", "conditions", "attacks")


def experiment(
    data: str | Path,
    output: str | Path,
    train_sizes: Sequence[int],
    seeds: int | Sequence[int],
    arms: Sequence[Named],
    settings: StudySettings | None = None,
    *,
    metrics: Sequence[Named] = (),
    test_data: External | Mapping[str, Any] | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: bool = True,
    report: bool = True,
    **study: Any,
) -> list[dict[str, Any]]:
    """Run a study and write its report; see ``docs/experiment.md`` for the files and what is measured.

    All arms of a size and seed share the labelled subset, the first weights, the batch order, the number of
    optimiser steps and the autoencoder. A study that was interrupted goes on behind its last finished cells when
    started again; sizes, seeds, arms and metrics may be added to a finished one.

    Functions and classes of yours may stand for arms, metrics, the classifier, the autoencoder, the base, conditions
    and attacks, by themselves or as texts MODULE:FUNCTION. Their source text is part of what a study belongs to: with
    another one its folder is refused. What they call is not looked at.

    Args:
        data: anything :func:`tsynd.load_data` takes.
        output: a new or empty folder, or that of the same study.
        train_sizes: labelled training images, one or more sizes.
        seeds: how many (they are 0, 1, ...), or which.
        arms: see :func:`tsynd.study.arms.parse_arm`; ``real`` is always there.
        settings: see :class:`StudySettings`.
        metrics: (probabilities [N, K], labels) → number, of every condition and cell, finished ones included: they are
            computed of the predictions that are kept.
        test_data: name → more test sets, as of other hospitals (what :func:`tsynd.load_data` takes), on all of whose
            images the classifiers of finished cells are scored; classes and shape must be the data's.
        workers: processes; by default one per core on a CPU and one on a GPU. On a CPU each has one thread: that is
            faster than fewer processes with more, and results do not depend on the number of either.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; None takes a GPU where there is one.
        progress: show a bar where rich is installed.
        report: write ``report.html`` and ``results.md`` too.
        **study: fields of the settings, instead of those given there, as ``iterations=500``.

    Returns:
        What every finished cell in the folder measured.

    Raises:
        InputError: an argument, the data or the output folder cannot be used; raised before training starts.
        MissingExtraError: a package is not installed.
    """
    settings = override(settings or StudySettings(), study, "a study")
    settings = replace(settings, **{name: _names(getattr(settings, name), name) for name in _NAMED})
    names = [name_of(arm, "arms") for arm in arms]
    measured = {name_of(metric, "metrics"): call_of(name_of(metric, "metrics"), "metrics") for metric in metrics}
    check_whole("workers", workers, optional=True)
    cells = cells_of(train_sizes, seeds, names)
    for module, extra in _NEEDED.items():  # now, not after the training
        require(module, extra)
    check_robustness(parse_attacks(settings.attacks))
    where = str(resolve_device(device))
    for size in dict.fromkeys(train_sizes):  # refuses one that is too small or too large
        source = load_data(data, train_size=size, **settings.reading.given())
    kinds = [parse_arm(arm) for arm in names]
    check_study(settings, source, kinds)
    whole = load_data(data, **settings.reading.given())
    say(whole.summary.lines(), progress)
    external = test_data if isinstance(test_data, External) else External(test_data or {})
    elsewhere = external.load(whole, settings.reading)
    content = [x for part in (whole.unlabelled, whole.val, whole.test) for x in (part.images, part.labels)]
    parts = {"kind": "experiment", **settings.content(), **({"code": code} if (code := settings.code()) else {})}
    with Job(Path(output).expanduser(), fingerprint(settings, content, **parts)) as job:
        for folder in job.folder.iterdir():  # models/, cells/, ...
            clear_leftovers(folder)
        place = Workplace(str(data), job.folder, settings, where)
        _check_code(place, {arm.text: arm.code for arm in kinds if arm.own})
        results, facts = _measure(job, place, source, cells, workers, progress)
        _finish(place, results, source.task, elsewhere, measured)
        if report:
            write_study(place, results, facts)
    return results


def _names(value: Any, what: str) -> Any:
    """Settings in which functions stand for their names."""
    if isinstance(value, (tuple, list)):
        return tuple(name_of(part, what) for part in value)
    return None if value is None else name_of(value, what)


def _check_code(place: Workplace, arms: dict[str, str | None]) -> None:
    """Refuse arms whose source text is another than that of their finished cells."""
    for row in read_cells(place.folder):
        if arms.get(row["arm"], row.get("code")) != row.get("code"):
            raise InputError(
                f"arms: {row['arm']} has changed since its cells in {place.folder} were made; wanted another name for "
                "what is new, or another folder"
            )


def _finish(
    place: Workplace,
    rows: list[dict[str, Any]],
    task: str,
    elsewhere: Mapping[str, LabelledImages],
    metrics: dict[str, Callable[..., Any]],
) -> None:
    """Add what needs no training to all cells, and write them together."""
    for row in rows:
        kept: dict[str, Tensor] = {}
        for name, tested in elsewhere.items():
            kept[name] = _logits_elsewhere(place, row, name, tested, task)
            row["scores"][f"at:{name}"] = plain(scores(kept[name], tested.labels, task))
        if metrics:
            _add_metrics(place, row, metrics)
        for name, logits in kept.items():
            chances = logits.softmax(1) if task == "multiclass" else logits.sigmoid()
            row["scores"][f"at:{name}"] |= _measure_by(metrics, chances, elsewhere[name].labels)
    with atomic_path(place.folder / "results.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _logits_elsewhere(place: Workplace, row: dict[str, Any], name: str, tested: LabelledImages, task: str) -> Tensor:
    """Of a cell's classifier, kept beside its predictions until it or the images are others."""
    cell = Cell(row["size"], row["seed"], row["arm"])
    weights = classifier_path(place, cell)
    belongs = hash_parts(hash_file(weights), tested.images.contiguous().numpy().data)
    path = predictions_path(place, cell).with_name(f"{cell.name}@{re.sub(r'[^A-Za-z0-9_=.+-]', '_', name)}.npz")
    arrays = read_arrays(path)
    if arrays is not None and str(arrays.get("of")) == belongs:
        return torch.from_numpy(arrays["logits"])
    logits = predictions(load_model(weights, device=place.device), tested, task=task)["clean"]
    save_npz(path, logits=logits, labels=tested.labels, of=np.array(belongs))
    return logits


def _measure_by(metrics: dict[str, Callable[..., Any]], chances: Tensor, labels: Tensor) -> dict[str, Any]:
    values = {}
    for text, metric in metrics.items():
        try:
            values[text.partition(":")[2]] = plain(float(metric(chances, labels)))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"metrics: {text}: {error}; wanted (probabilities, labels) → number") from error
    return values


def _add_metrics(place: Workplace, row: dict[str, Any], metrics: dict[str, Callable[..., Any]]) -> None:
    """Add metrics of the kept predictions to a cell's scores.

    Raises:
        InputError: a metric that fails, or has a score's name.
    """
    path = predictions_path(place, Cell(row["size"], row["seed"], row["arm"]))
    if (arrays := read_arrays(path)) is None:
        raise InputError(f"metrics: {path} is gone or damaged; wanted its arm, size and seed among those to be run")
    kept = {name: torch.from_numpy(array) for name, array in arrays.items()}
    labels = kept.pop("labels")
    for condition, chances in kept.items():
        own = _measure_by(metrics, chances, labels)
        if known := set(own) & set(row["scores"][condition]):
            raise InputError(f"metrics: got {min(known)!r}, wanted another name: there is a score of it")
        row["scores"][condition] |= own


def _measure(
    job: Job,
    place: Workplace,
    source: DataSource,
    cells: Sequence[Cell],
    workers: int | None,
    progress: bool,
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
    row = read_sealed(cell_path(place, cell))
    if row is None or not _whole(classifier_path(place, cell)):
        return False
    predictions = predictions_path(place, cell)
    if not predictions.is_file() or row.get("predictions") != hash_file(predictions):
        return False
    return row["quality"] is None or read_arrays(samples_path(place, cell)) is not None


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
