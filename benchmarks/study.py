"""``python -m benchmarks.study``: one study over several data sets, grown seed by seed until the time is up.

Every set has a folder of its own under ``--output`` (a study as ``tsynd experiment`` makes it, so that it resumes), and
the rows of all of them go to one JSON-lines file, which ``python -m benchmarks.pages`` makes the tables of.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tsynd.study.experiment import experiment
from tsynd.study.settings import DEFAULT_ARMS, StudySettings
from tsynd.utils.atomic import atomic_path

__all__ = ["rounded", "shrink"]


def shrink(source: Path, target: Path, side: int) -> Path:
    """A copy of an .npz whose pictures [N, H, W(, C)] are at most ``side`` wide, by the mean over areas."""
    with np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for name in [name for name in arrays if name.endswith("_images") and arrays[name].shape[2] > side]:
        pixels = torch.from_numpy(arrays[name]).float()
        grey = pixels.ndim == 3
        pixels = pixels[:, None] if grey else pixels.movedim(-1, 1)
        small = functional.interpolate(pixels, (side, side), mode="area").round().byte()
        arrays[name] = (small[:, 0] if grey else small.movedim(1, -1)).numpy()
    with atomic_path(target) as temporary, temporary.open("wb") as out:
        np.savez(out, **arrays)
    return target


def rounded(value: Any) -> Any:
    """The same with four digits, and without loss curves."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items() if key != "loss_curve"}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _steps(sets: list[Path], sizes: list[int], seeds: int) -> Iterator[tuple[Path, int, int]]:
    """Set, size and number of seeds, so that whatever has been done is balanced over the sets."""
    for count in range(1, seeds + 1):
        for size in sizes:
            for data in sets:
                yield data, size, count


def main() -> None:
    """Run what the time allows, and write the rows after every step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=".npz files in MedMNIST's layout")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="the JSON-lines file")
    parser.add_argument("--train-size", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT_ARMS))
    parser.add_argument("--side", type=int, default=None, help="shrink larger pictures to this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no step is begun after so many")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--settings", type=json.loads, default={}, help="of tsynd.study.settings.StudySettings, JSON")
    given = parser.parse_args()
    lists = {name: tuple(value) for name, value in given.settings.items() if isinstance(value, list)}
    settings = StudySettings(**{"iterations": 250, "batch_size": 32, **given.settings, **lists})
    given.output.mkdir(parents=True, exist_ok=True)
    sets = given.data
    if given.side is not None:
        sets = [shrink(path, given.output / f"{path.stem}_{given.side}.npz", given.side) for path in sets]
    found: dict[str, list[dict[str, Any]]] = {}
    start = time.monotonic()
    for data, size, seeds in _steps(sets, given.train_size, given.seeds):
        if time.monotonic() - start > 60 * given.minutes:
            break
        folder = given.output / data.stem
        found[data.stem] = experiment(
            data, folder, [size], seeds, given.arms, settings, workers=given.workers, progress=False, report=False
        )
        rows = [rounded({**row, "data": name}) for name, own in found.items() for row in own]
        with atomic_path(given.rows) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{(time.monotonic() - start) / 60:.1f} min: {data.stem}, {size} labels, {seeds} seeds", flush=True)


if __name__ == "__main__":
    main()
