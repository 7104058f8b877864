"""``python -m benchmarks.large_runs workers | memory | bookkeeping | schedule``: big runs, measured and simulated."""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsynd.distributed.ray import run_on_ray
from tsynd.distributed.shards import Sample, ShardFolder, Unit, plan_units
from tsynd.distributed.worker import ShardSettings, ShardWorker
from tsynd.models.checkpoint import save_model
from tsynd.models.networks import SmallAutoencoder, SmallResNet


def make_job(folder: Path, count: int, small: bool, size: int = 28) -> dict[str, Any]:
    """Untrained models and random images: what they show does not matter to time and memory."""
    torch.manual_seed(0)
    coder = SmallAutoencoder(1, 2, (4, 8)) if small else SmallAutoencoder(1)
    model = SmallResNet(1, 2, widths=(4, 8)) if small else SmallResNet(1, 2)
    coder.latent_std.fill_(1.0)
    save_model(coder, folder / "autoencoder")
    save_model(model, folder / "classifier", class_names=["0", "1"])
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size), np.uint8)
    np.savez(folder / "data.npz", images=pixels, labels=np.arange(count) % 2)
    names = {"data": "data.npz", "autoencoder": "autoencoder.safetensors", "classifier": "classifier.safetensors"}
    return {key: str(folder / name) for key, name in names.items()}


def measure_workers(folder: Path, rounds: int, units: int, shard_size: int) -> None:
    """Images/s of one and of two Ray actors with a thread each, interleaved, behind each actor's first unit."""
    import ray

    job = make_job(folder, units * shard_size, small=False)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(rounds):
        for workers in (1, 2):
            output = str(folder / f"out-{turn}-{workers}")
            settings = ShardSettings(**job, output=output, shard_size=shard_size, device="cpu", threads=1)
            worker = ShardWorker(settings)
            worker.folder.open()
            worker.close()
            times: list[float] = []
            run_on_ray(
                settings, worker.folder.fingerprint, worker.folder.units, workers, "local",
                lambda receipt, times=times: times.append(time.perf_counter()),  # type: ignore[misc]
            )  # fmt: skip
            # from the moment all actors work to the last moment that they all do
            first, last = workers - 1, len(times) - workers
            rates[workers].append((last - first) * shard_size / (times[last] - times[first]))
            print(f"round {turn}, {workers} worker(s): {rates[workers][-1]:.1f} images/s", flush=True)
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    one, two = (statistics.median(rates[n]) for n in (1, 2))
    print(f"median {one:.1f} and {two:.1f} images/s, ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} .. "
          f"{max(ratios):.2f})")  # fmt: skip


def _resident() -> float:
    """This process's resident memory in MiB."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_memory(folder: Path, count: int) -> None:
    """Resident memory of a worker after every thousand images."""
    job = make_job(folder, count, small=True)
    settings = ShardSettings(
        **job, output=str(folder / "out"), shard_size=1000, device="cpu", threads=1, samples=8, steps=2
    )
    worker = ShardWorker(settings)
    worker.folder.open()
    start, seen = time.perf_counter(), []
    for unit in worker.folder.units:
        worker.make(unit)
        seen.append(_resident())
    seconds = time.perf_counter() - start
    held = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    print(f"{count} images in {seconds:.0f} s; MiB at 1000 images {seen[0]:.1f}, at the end {seen[-1]:.1f}, "
          f"least {min(seen):.1f}, most {max(seen):.1f}: {seen[-1] / seen[0] - 1:+.1%}; "
          f"{held / count:.0f} bytes per image on disk")  # fmt: skip


def _fake(unit: Unit) -> Iterator[Sample]:
    image = np.zeros((1, 1), np.uint8)
    for sample_id in range(unit.start, unit.stop):
        yield Sample(sample_id, image, sample_id % 2, 0.0, 0.0, "raised")


def measure_bookkeeping(folder: Path, units: int) -> None:
    """What a driver does per unit: planning, scanning, Ray's dispatch."""
    start = time.perf_counter()
    plan_units(units * 4096, 4096)
    print(f"planning: {(time.perf_counter() - start) / units * 1e6:.2f} µs per unit")
    shards = ShardFolder(folder / "job", {"images": units, "shard_size": 1}, {})
    shards.open()
    start = time.perf_counter()
    for unit in shards.units:
        shards.write(unit, _fake(unit), "png")
    print(f"writing and syncing three files: {(time.perf_counter() - start) / units * 1e3:.2f} ms per unit")
    for checksum in (False, True):
        start = time.perf_counter()
        assert not shards.missing(shards.units, checksum)
        kind = "checksum" if checksum else "size"
        print(f"scanning by {kind}: {(time.perf_counter() - start) / units * 1e6:.0f} µs per unit")
    start = time.perf_counter()
    shards.finish()
    size = (folder / "job" / "manifest.json").stat().st_size
    print(f"manifest: {(time.perf_counter() - start) / units * 1e6:.0f} µs, {size / units:.0f} bytes per unit")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")

    class Idle:
        def make(self, unit: Unit) -> dict[str, Any]:
            return {"images": len(unit)}

    idle: Any = ray.remote(num_cpus=1)(Idle)
    pool = ray.util.ActorPool([idle.remote() for _ in range(2)])
    list(pool.map_unordered(lambda a, u: a.make.remote(u), shards.units[:50]))
    start = time.perf_counter()
    list(pool.map_unordered(lambda a, u: a.make.remote(u), shards.units))
    print(f"Ray's dispatch, two actors: {(time.perf_counter() - start) / units * 1e3:.2f} ms per unit")


def simulate(folder: Path, workers: int, units: int, unit_seconds: float, mtbf: float, drivers: int) -> dict[str, Any]:
    """A schedule in simulated time whose units are planned, written, damaged, scanned and finished by the real code.

    A worker takes the next unit when it is done with one (speeds spread by 10 %), dies after an exponential time of
    mean ``mtbf`` seconds, leaving what it had written, and is back 60 s later. At ``drivers`` random moments the
    driver is killed with all that is in flight; a new one scans the folder and goes on after 120 s. Samples are
    one-pixel images, one per unit: the files and receipts are real, their content is small.
    """
    moments = random.Random(0)
    job = folder / "job"
    fingerprint = {"images": units, "shard_size": 1, "seed": 0}
    ideal = units * unit_seconds / workers
    kills = sorted(moments.uniform(0.1, 0.9) * ideal for _ in range(drivers))
    now, spent, deaths, made, scan_seconds = 0.0, 0.0, 0, 0, 0.0
    speeds = [moments.lognormvariate(0, 0.1) for _ in range(workers)]
    die_at = [moments.expovariate(1 / mtbf) for _ in range(workers)]
    while True:
        shards = ShardFolder(job, fingerprint, {})
        shards.open()
        started = time.perf_counter()
        todo = shards.missing(shards.units, checksum=True)
        scan_seconds += time.perf_counter() - started
        if not todo:
            break
        waiting = list(reversed(todo))
        kill = kills.pop(0) if kills else float("inf")
        free = [(now, worker) for worker in range(workers)]
        heapq.heapify(free)
        end = now
        while waiting and free:
            at, worker = heapq.heappop(free)
            if at >= kill:
                continue
            unit = waiting.pop()
            done = at + unit_seconds * speeds[worker]
            if min(die_at[worker], kill) < done:
                stop = min(max(die_at[worker], at), kill)
                spent += stop - at
                if moments.random() < 0.5:  # it died while it wrote: half a file under its temporary or its own name
                    name = f".{unit.name}-dead.tar" if moments.random() < 0.8 else f"{unit.name}.tar"
                    (job / name).write_bytes(b"x" * 99)
                waiting.append(unit)
                if die_at[worker] <= kill:
                    deaths += 1
                    back = stop + 60
                    die_at[worker] = back + moments.expovariate(1 / mtbf)
                    heapq.heappush(free, (back, worker))
                continue
            spent += done - at
            shards.write(unit, _fake(unit), "png")
            made += 1
            end = max(end, done)
            heapq.heappush(free, (done, worker))
        now = kill + 120 if waiting else end
    shards = ShardFolder(job, fingerprint, {})
    shards.open()
    complete = shards.finish()
    assert complete is not None
    assert [shard["start"] for shard in complete["shards"]] == list(range(units))
    assert not list(job.rglob(".shard-*"))
    return {
        "workers": workers, "units": units, "unit_seconds": unit_seconds, "mtbf_hours": mtbf / 3600,
        "driver_kills": drivers, "worker_deaths": deaths, "units_made": made, "ideal_seconds": round(ideal),
        "seconds": round(now), "efficiency": round(ideal / now, 3),
        "work_lost": round(spent / (units * unit_seconds * statistics.fmean(speeds)) - 1, 4),
        "real_scan_seconds": round(scan_seconds, 2),
    }  # fmt: skip


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_runs", description=__doc__)
    parser.add_argument("what", choices=["workers", "memory", "bookkeeping", "schedule"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--units", type=int, default=None)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.what == "workers":
            measure_workers(folder, arguments.rounds, arguments.units or 12, arguments.shard_size)
        elif arguments.what == "memory":
            measure_memory(folder, arguments.images)
        elif arguments.what == "bookkeeping":
            measure_bookkeeping(folder, arguments.units or 1000)
        else:
            for seconds, mtbf, kills in ((60.0, 86400.0, 2), (60.0, 3600.0, 2), (600.0, 3600.0, 2)):
                (folder / f"{seconds}-{mtbf}").mkdir()
                row = simulate(
                    folder / f"{seconds}-{mtbf}", arguments.workers, arguments.units or 5000, seconds, mtbf, kills
                )
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
