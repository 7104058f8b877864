"""Synthesis of more images than memory holds: shard by shard, in one process, on Ray actors or torchrun ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tsynd.distributed.ray import run_on_ray
from tsynd.distributed.shards import Unit
from tsynd.distributed.worker import ShardSettings, ShardWorker
from tsynd.utils.errors import InputError, require
from tsynd.utils.progress import progress_bar

__all__ = ["synthesize_shards", "torchrun_place"]

Report = Callable[[dict[str, Any]], None]


class _Speed:
    """Images per second over all workers, for the bar."""

    def __init__(self) -> None:
        self._start, self._images = 0.0, -1

    def note(self, receipt: dict[str, Any]) -> str:
        if self._images < 0:  # workers start at different times: counted from the first shard on
            self._start, self._images = time.perf_counter(), 0
            return ""
        self._images += receipt["images"]
        speed = self._images / (time.perf_counter() - self._start)
        return (
            f"{speed:.1f} images/s, uncertainty {receipt['mean_uncertainty_before']:.4f} → "
            f"{receipt['mean_uncertainty']:.4f}"
        )


def torchrun_place() -> tuple[int, int]:
    """(rank, number of ranks) that torchrun gave this process; (0, 1) without it.

    Raises:
        InputError: the variables are no such numbers.
    """
    try:
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        rank, ranks = -1, 0
    if not 0 <= rank < ranks:
        raise InputError(f"RANK, WORLD_SIZE: got {os.environ.get('RANK')}, {os.environ.get('WORLD_SIZE')}")
    return rank, ranks


def synthesize_shards(
    settings: ShardSettings,
    *,
    workers: int | None = None,
    ray: str | None = None,
    checksum: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Make every shard of the job that is not there whole.

    Under torchrun, rank r of W makes the units r, r + W, ... and no process waits for another. With ``ray``, Ray's
    actors make them. Otherwise this process does.

    Args:
        settings: the job.
        workers: number of Ray actors; more than one without ``ray`` starts a local Ray.
        ray: address of a Ray cluster, or ``local``.
        checksum: verify finished shards by checksum and not by size alone.
        progress: show a bar where rich is installed.
        say: told what was found damaged.

    Returns:
        The complete manifest; None where other ranks have not finished theirs.

    Raises:
        InputError: an argument, the data, the models or the folder cannot be used.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers: got {workers}, wanted 1 or more")
    rank, ranks = torchrun_place()
    if ranks > 1 and (ray is not None or (workers or 1) > 1):
        raise InputError("ray, workers: not under torchrun, whose ranks are the workers")
    with_ray = ray is not None or (workers or 1) > 1
    if with_ray:
        require("ray", "big")
    elif ranks > 1 and settings.device in (None, "cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        settings = replace(settings, device=f"cuda:{local}")
    worker = ShardWorker(settings, look_only=with_ray)
    try:
        folder = worker.folder
        folder.open()
        mine = folder.units[rank::ranks]
        todo = folder.missing(mine, checksum)
        for note in folder.notes:
            say(note)
        speed = _Speed()
        with progress_bar("synthesising", sum(map(len, mine)), progress and rank == 0) as advance:
            advance(sum(map(len, mine)) - sum(map(len, todo)), "")

            def report(receipt: dict[str, Any]) -> None:
                advance(receipt["images"], speed.note(receipt))

            if with_ray:
                worker.close()
                run_on_ray(settings, folder.fingerprint, todo, workers, ray or "local", report)
            else:
                _run_here(worker, todo, report)
        return folder.finish()
    finally:
        worker.close()


def _run_here(worker: ShardWorker, units: Sequence[Unit], report: Report) -> None:
    for unit in units:
        report(worker.make(unit))
