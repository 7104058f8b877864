"""Units on Ray: actors that load the models once; Ray gives the units out, restarts what dies and tries again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tsynd.distributed.shards import Unit
from tsynd.distributed.worker import ShardWorker
from tsynd.utils.errors import InputError, first_line, require

__all__ = ["run_on_ray"]

_RETRIES = 5  # of one unit, each after its actor died


class _Actor:
    """A worker in its own process."""

    def __init__(self, settings: Any, expected: dict[str, Any]) -> None:
        self._refusal = ""
        try:
            self._worker = ShardWorker(settings, expected)
        except InputError as error:  # an actor whose construction fails would only say that it is dead
            self._refusal = str(error)

    def make(self, unit: Unit) -> dict[str, Any]:
        if self._refusal:
            return {"refused": self._refusal}
        try:
            return self._worker.make(unit)
        except InputError as error:
            return {"refused": str(error)}


@contextmanager
def _connected(ray: Any, address: str, workers: int, threads: int) -> Iterator[None]:
    """A Ray to use: one that this process already has, a new local one, or a cluster's."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address == "local":
            ray.init(address="local", num_cpus=workers * threads, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"ray: {address!r} cannot be reached: {first_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def run_on_ray(
    settings: Any,
    fingerprint: dict[str, Any],
    units: Sequence[Unit],
    workers: int | None,
    address: str,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Make the units; one waits at each actor, the rest at the driver.

    An actor takes one GPU where ``settings.device`` is cuda (or None and the cluster has GPUs), else
    ``settings.threads`` cores (one by default).

    Raises:
        InputError: what a worker refused, or a unit whose actors died again and again.
    """
    if not units:
        return
    ray = require("ray", "big")
    pool = require("ray.util", "big").ActorPool
    threads = settings.threads or 1
    local_workers = workers or max(1, (os.cpu_count() or 1) // threads)
    with _connected(ray, address, local_workers, threads):
        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0)) if (settings.device or "cuda").startswith("cuda") else 0
        if settings.device is not None and settings.device.startswith("cuda") and not gpus:
            raise InputError(f"device: got {settings.device!r}, but the Ray cluster has no GPU")
        most = gpus or int(have.get("CPU", 1)) // threads
        if workers is not None and workers > most:
            raise InputError(f"workers: got {workers}, but the Ray cluster has room for {most}")
        needs = {"num_cpus": 1, "num_gpus": 1} if gpus else {"num_cpus": threads}
        place = replace(settings, device="cuda" if gpus else "cpu", threads=settings.threads if gpus else threads)
        actor = ray.remote(**needs, max_restarts=-1, max_task_retries=_RETRIES)(_Actor)
        actors = [actor.remote(place, fingerprint) for _ in range(min(workers or most, len(units)))]
        try:
            # the pool hands an actor its next unit when it gives back the last
            for receipt in pool(actors).map_unordered(lambda a, unit: a.make.remote(unit), list(units)):
                if "refused" in receipt:
                    raise InputError(receipt["refused"])
                report(receipt)
        except ray.exceptions.RayActorError as error:
            raise InputError(
                f"ray: a unit's worker died {_RETRIES + 1} times ({first_line(error)}); finished shards are "
                "kept, the same command goes on behind them"
            ) from error
        finally:
            for one in actors:
                ray.kill(one)
