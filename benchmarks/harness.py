"""Interleaved timing: every method once a round, so that a drifting machine hurts all alike."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tsynd.utils.version import __version__

__all__ = [
    "Pair",
    "Row",
    "check",
    "describe_machine",
    "label",
    "measure",
    "measure_shapes",
    "peak_bytes",
    "print_table",
    "read_json",
    "table",
    "tolerance",
    "write_json",
]

Pair = tuple[Tensor, Tensor]
"""Value [B] and its gradient."""


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
    about = Path("/proc/cpuinfo")
    for line in about.read_text(encoding="utf-8").splitlines() if about.exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    if device.startswith("cuda"):
        model = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, tsynd {__version__}"
    return f"{model}, {torch.get_num_threads()} threads, {_isa()}{versions}"


def _isa() -> str:
    with contextlib.suppress(ImportError):
        from tsynd.ops import _C  # type: ignore[attr-defined]

        return f"{_C.build_info()['cpu_kernels']} kernels, "
    return "no compiled kernels, "


def label(name: str, sizes: tuple[int, ...]) -> str:
    """A shape as it stands in a table."""
    return f"{name} {'·'.join(map(str, sizes))}"


def tolerance(dtype: torch.dtype) -> float:
    """Error that is let through, relative to the largest entry."""
    return 1e-5 if dtype == torch.float32 else 0.1


def check(name: str, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    """Stop the program unless the method gives what it should, within ``tolerance`` of the largest entry."""
    for part, (a, b) in enumerate(zip(got, wanted, strict=True)):
        error = float((a.double().cpu() - b.double().cpu()).abs().max() / b.double().abs().max().clamp_min(1e-30))
        if not error <= tolerance:
            what = ("value", "gradient")[part] if len(got) == 2 else "result"
            raise SystemExit(f"{name}: {what} is off by {error:.1e} (relative to the largest), not timed")


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


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Bytes the call added at its peak: the CUDA allocator's count, or growth of the resident set's maximum.

    Memory that the C library keeps for reuse would hide a call's own; it is given back before.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5", encoding="utf-8")  # resets the resident set's high-water mark
    except OSError:
        return None
    before = _high_water()
    run()
    return max(0, _high_water() - before)


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
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
    warmups: int = 2,
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
        warmups: rounds before the measured ones.
        least_rounds: measured rounds at least.
        most_rounds: measured rounds at most.
    """
    for run in methods.values():
        for _ in range(warmups):
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
            peak_bytes(run, device),
            statistics.median(times[name]) / base,
            machine,
        )
        for name, run in methods.items()
    ]


def table(rows: list[Row]) -> list[str]:
    """Rows as the lines of a Markdown table."""
    lines = ["| shape | method | median ms | 20–80 % | peak MiB | ÷ floor |", "|---|---|---|---|---|---|"]
    for row in rows:
        peak = "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        lines.append(
            f"| {row.shape} | {row.method} | {row.median_ms:.4g} | {row.p20_ms:.4g}–{row.p80_ms:.4g}"
            f" | {peak} | {row.over_floor:.2f} |"
        )
    return lines


Sizes = TypeVar("Sizes", bound=tuple[int, ...])


def measure_shapes(
    suite: str,
    sizes: Mapping[str, Sizes],
    shapes: list[str],
    methods: Callable[[Sizes, str, torch.dtype], Mapping[str, Callable[[], object]]],
    *,
    floor: str,
    device: str,
    dtype: torch.dtype,
    seconds: float,
) -> list[Row]:
    """Measure the methods of one suite at each of the named shapes.

    Args:
        suite: name of the benchmark.
        sizes: of every shape, by its name.
        shapes: names of those wanted.
        methods: (sizes, device, dtype) -> what to time, see :func:`measure`.
        floor: see :func:`measure`.
        device: see there.
        dtype: of the tensors.
        seconds: budget for each shape.
    """
    rows: list[Row] = []
    for name in shapes:
        rows += measure(
            suite,
            label(name, sizes[name]),
            methods(sizes[name], device, dtype),
            floor=floor,
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            seconds=seconds,
        )
    return rows


def print_table(rows: list[Row]) -> None:
    """Print rows as a Markdown table."""
    print("\n".join(table(rows)), flush=True)


def write_json(rows: list[Row], path: Path) -> None:
    """Write rows as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> list[Row]:
    """Rows that :func:`write_json` wrote."""
    names = {field.name for field in fields(Row)}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**{key: value for key, value in row.items() if key in names}) for row in rows]
