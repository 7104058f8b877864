"""A study: every arm trained and tested at every size and seed, in parallel processes, resumable cell by cell."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsynd.attacks import check_robustness
from tsynd.checks import resolve_device
from tsynd.data import load_data
from tsynd.errors import InputError, require
from tsynd.job import Job
from tsynd.progress import progress_bar
from tsynd.storage import atomic_path
from tsynd.studies.arms import parse_arm
from tsynd.studies.cell import run_cell, train_autoencoder
from tsynd.studies.report import write_study
from tsynd.studies.settings import (
    Cell,
    StudySettings,
    Workplace,
    autoencoder_path,
    cell_path,
    cells_of,
    check_study,
    classifier_path,
    fingerprint,
    samples_path,
)
from tsynd.version import __version__

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
    "captum.attr": "robustness",
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
        arms: see :func:`tsynd.studies.arms.parse_arm`; ``real`` is always there.
        settings: see :class:`StudySettings`.
        workers: processes; by default one per core on a CPU and one on a GPU. On a CPU each has one thread: that is
            faster than fewer processes with more, and results do not depend on the number of either.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; None takes a GPU where there is one.
        progress: show a bar where rich is installed.

    Returns:
        What every finished cell in the folder measured.

    Raises:
        InputError: an argument, the data or the output folder cannot be used; raised before training starts.
        MissingExtraError: a package is not installed.
    """
    settings = settings or StudySettings()
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise InputError(f"workers: got {workers!r}, wanted an integer of 1 or more")
    cells = cells_of(train_sizes, seeds, arms)
    for module, extra in _NEEDED.items():  # now, not after the training
        require(module, extra)
    if settings.attacks or any(parse_arm(arm).kind == "adversarial" for arm in arms):
        check_robustness()
    where = str(resolve_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    for size in dict.fromkeys(train_sizes):  # refuses one that is too small or too large
        source = load_data(data, train_size=size, **settings.reading.given())
    check_study(settings, source, [parse_arm(arm) for arm in arms])
    job = Job(Path(output).expanduser(), fingerprint(load_data(data, **settings.reading.given()), settings))
    place = Workplace(str(data), job.folder, settings, where)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers or (1 if where.startswith("cuda") else cores)
    tasks = _plan(place, cells)
    with progress_bar("cells", len(cells), progress) as report:
        threads = None if where.startswith("cuda") else 1
        _work(tasks, min(count, max(len(tasks), 1)), threads, _Progress(report, len(cells), tasks))
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
    write_study(place, results, facts)
    return results


@dataclass
class _Task:
    """One piece of work for a process, and the pieces that must be finished before it."""

    name: str
    work: Callable[[], Any]
    needs: tuple[str, ...] = ()
    is_cell: bool = True


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
            if not (path.exists() and path.with_suffix(".json").exists()):
                work = _Autoencoder(place, cell.size, cell.seed)
                tasks.setdefault(path.name, _Task(path.name, work, is_cell=False))
                needs.append(path.name)
            real = Cell(cell.size, cell.seed, "real")
            if real.name in tasks:
                needs.append(real.name)
        tasks[cell.name] = _Task(cell.name, _RunCell(place, cell), tuple(needs))
    return list(tasks.values())


def _finished(place: Workplace, cell: Cell) -> bool:
    if _read(cell_path(place, cell)) is None:
        return False
    weights = classifier_path(place, cell)
    whole = weights.exists() and weights.with_suffix(".json").exists()
    return whole and (not parse_arm(cell.arm).generative or samples_path(place, cell).exists())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and "scores" in row else None


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The results of all finished cells of a study's folder, by size, seed and arm."""
    rows = [_read(path) for path in (folder / "cells").glob("[!.]*.json")]
    return sorted((row for row in rows if row), key=lambda row: (row["size"], row["seed"], row["arm"]))


@dataclass
class _Progress:
    """Cells done and time left, from the mean pace so far."""

    report: Callable[[int, str], None]
    total: int
    tasks: Sequence[_Task]
    start: float = field(default_factory=time.monotonic)
    done: int = 0

    def __post_init__(self) -> None:
        self.left = sum(task.is_cell for task in self.tasks)
        self.report(self.total - self.left, "" if self.left else "all were finished")

    def finished(self, task: _Task) -> None:
        """Count a task."""
        self.done += 1
        remaining = (time.monotonic() - self.start) / self.done * (len(self.tasks) - self.done)
        left = f", about {math.ceil(remaining / 60)} min left" if remaining else ""
        self.report(int(task.is_cell), f"last {task.name}{left}")


def _work(tasks: Sequence[_Task], workers: int, threads: int | None, progress: _Progress) -> None:
    """Do all tasks, each after those it needs."""
    if workers == 1:
        with _threads(threads):
            for task in tasks:
                task.work()
                progress.finished(task)
        return
    waiting, running = list(tasks), dict[Future[Any], _Task]()
    # a fresh interpreter each: forking after torch has started its threads may hang
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())  # the caller's own
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(threads,))
    try:
        while waiting or running:
            open_ = {task.name for task in waiting} | {task.name for task in running.values()}
            for task in [task for task in waiting if not open_ & set(task.needs)][: workers - len(running)]:
                waiting.remove(task)
                running[pool.submit(task.work)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                future.result()
                progress.finished(task)
    except BrokenProcessPool:
        raise InputError(
            "workers: a process was killed, perhaps for want of memory; wanted fewer --workers. The same command"
            " goes on behind the finished cells"
        ) from None
    finally:
        children = set(multiprocessing.active_children()) - others if waiting or running else set()
        pool.shutdown(wait=not children, cancel_futures=True)
        for child in children:
            child.terminate()
            child.join()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_worker(threads: int | None) -> None:
    """In a new process: so many threads, deaf to Ctrl-C (the parent ends it), gone when the parent is."""
    torch.set_num_threads(threads or torch.get_num_threads())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # the attacks' progress bars would make a semaphore between processes, which the killed leave behind
    with contextlib.suppress(ImportError):
        importlib.import_module("tqdm.std").tqdm.set_lock(threading.RLock())
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
