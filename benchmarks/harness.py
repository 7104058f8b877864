"""Interleaved timing: every method once a round, so that a drifting machine hurts all alike."""

from __future__ import annotations

import gc
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

__all__ = ["Row", "describe_machine", "measure", "print_table", "write_json"]


@dataclass(frozen=True)
class Row:
    """One measured method at one shape; times in milliseconds, quantiles over interleaved rounds."""

    suite: str
    shape: str
    method: str
    device: str
    dtype: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_bytes: int | None
    over_floor: float
    machine: str


def describe_machine(device: str) -> str:
    """Device, threads and versions in one line."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    if device.startswith("cuda"):
        model = torch.cuda.get_device_name()
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _milliseconds(run: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def _peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Bytes the call added at its peak: the CUDA allocator's count, or growth of the resident set's maximum."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # resets the resident set's high-water mark
    except OSError:
        return None
    before = _high_water()
    run()
    return max(0, _high_water() - before)


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    suite: str,
    shape: str,
    methods: Mapping[str, Callable[[], object]],
    *,
    floor: str,
    device: str = "cpu",
    dtype: str = "float32",
    seconds: float = 4.0,
    least_rounds: int = 5,
    most_rounds: int = 400,
) -> list[Row]:
    """Time every method in turn, round after round, until ``seconds`` have gone by.

    Args:
        suite: name of the benchmark.
        shape: label of the problem size.
        methods: name -> callable that runs the whole method once.
        floor: the method whose median is the unit of ``over_floor``.
        device: ``cpu`` or ``cuda``.
        dtype: label.
        seconds: budget for this shape.
        least_rounds: measured rounds at least.
        most_rounds: measured rounds at most.
    """
    for run in methods.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in methods}
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_rounds or (time.perf_counter() < end and rounds < most_rounds):
        for name, run in methods.items():
            times[name].append(_milliseconds(run, device))
        rounds += 1
    gc.enable()
    base = statistics.median(times[floor])
    machine = describe_machine(device)
    return [
        Row(
            suite,
            shape,
            name,
            device,
            dtype,
            statistics.median(times[name]),
            _quantile(times[name], 0.2),
            _quantile(times[name], 0.8),
            _peak_bytes(run, device),
            statistics.median(times[name]) / base,
            machine,
        )
        for name, run in methods.items()
    ]


def print_table(rows: list[Row]) -> None:
    """Print rows as a Markdown table."""
    print("| shape | method | median ms | 20–80 % | peak MiB | ÷ floor |\n|---|---|---|---|---|---|")
    for row in rows:
        peak = "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        print(
            f"| {row.shape} | {row.method} | {row.median_ms:.3f} | {row.p20_ms:.3f}–{row.p80_ms:.3f}"
            f" | {peak} | {row.over_floor:.2f} |"
        )


def write_json(rows: list[Row], path: Path) -> None:
    """Write rows as JSON, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    temporary.replace(path)
