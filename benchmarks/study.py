"""``python -m benchmarks.study DATA OUTPUT``: the study of docs/study.md over four sets of images.

Resumable: started again it goes on behind the last finished cell. The cells go to docs/study.jsonl, from which
``python -m benchmarks.pages`` makes the page's tables.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tsynd.study.experiment import experiment, read_cells
from tsynd.study.settings import StudySettings
from tsynd.study.statistics import mean_interval, sign_flip_p
from tsynd.study.summary import Row, measure_of
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import require

__all__ = ["ARMS", "RECIPE", "SETS", "SETTINGS", "against", "draw", "merge", "name_of", "per_set", "shrink"]

SETS = {"pneumoniamnist": "none", "busi_64": "horizontal", "braintumor3_64": "horizontal", "papsmear7_64": "horizontal"}
"""File names of the sets, and which flips their modality allows."""

_CHEAP, _BASE = "steps=1,trades.budget=3/255", "base=standard"
RECIPE = f"trades+expected_information,{_CHEAP},{_BASE}"
ARMS = (
    "real",
    "standard",
    "randaugment",
    "adversarial",
    "trades",
    f"real,{_BASE}",
    f"trades,{_BASE}",
    RECIPE,
    f"trades,steps=1,budget=3/255,{_BASE}",
    f"trades+random,trades.{_CHEAP},{_BASE}",
    f"trades+mutual_information,{_CHEAP},{_BASE}",
    f"trades+entropy,{_CHEAP},{_BASE}",
    "real,iterations=575",
    "standard,iterations=375",
)
_NAMES = {
    "real": "real only",
    ARMS[12]: "real only, as long as the recipe trains",
    "standard": "standard augmentation, beside",
    ARMS[13]: "standard augmentation, beside, as long",
    "randaugment": "RandAugment",
    "adversarial": "adversarial training",
    "trades": "TRADES",
    ARMS[5]: "standard augmentation, in place",
    ARMS[6]: "TRADES on standard images, five steps",
    ARMS[7]: "**recipe**: TRADES and targeted (expected information) in turn, on standard images",
    ARMS[8]: "the recipe without targeted images",
    ARMS[9]: "the recipe with random latents",
    ARMS[10]: "the recipe with mutual information",
    ARMS[11]: "the recipe with entropy",
}
SETTINGS = StudySettings(
    iterations=250,
    batch_size=32,
    conditions=("clean", "shifts:1", "shifts:3", "shifts:5", "medmnist_c:3"),
    attacks=("pgd:2/255", "pgd:4/255", "apgd:2/255", "square:2/255"),
    attack_images=100,
    query_images=40,
)
_CLEAN_ALONE = ("f1", "average_precision", "sensitivity_at_90", "recall:")  # not committed of other conditions
_MEASURES = {"clean": 100, "shifts": 100, "medmnist_c": 100, "worst:2/255": 100, "nll": 1}
_TITLES = ("Clean %", "Shifted %", "MedMNIST-C %", "Worst attack, 2/255 %", "NLL ↓")


def shrink(source: Path, target: Path, size: int = 28) -> None:
    """A copy of a MedMNIST-style file with square images of ``size``, averaged over areas."""
    with np.load(source, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    for key, pixels in arrays.items():
        if key.endswith("_images") and pixels.shape[1] != size:
            x = torch.from_numpy(pixels).float()
            x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
            small = functional.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
            small = small.round().clamp(0, 255).byte()
            arrays[key] = (small[:, 0] if small.shape[1] == 1 else small.permute(0, 2, 3, 1)).numpy()
    with atomic_path(target) as temporary, temporary.open("wb") as out:
        np.savez(out, **arrays)


def name_of(arm: str) -> str:
    """An arm in words, whichever flips its set allows."""
    plain = ",".join(part for part in arm.split(",") if not part.startswith("flip="))
    plain = re.sub("base=standard:[a-z]+", _BASE, plain)
    return _NAMES.get(plain, plain)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) and math.isfinite(value) else value


def merge(folder: Path, page: Path) -> int:
    """Write the cells of every set below ``folder`` to one JSON-lines file; their number."""
    rows = [row for part in sorted(folder.iterdir()) if (part / "cells").is_dir() for row in read_cells(part)]
    rows.sort(key=lambda row: (row["data"], row["size"], row["seed"], row["arm"]))
    kept = []
    for row in rows:
        slim = {key: value for key, value in row.items() if key not in ("digest", "quality")}
        slim["scores"] = {
            name: {k: v for k, v in one.items() if name == "clean" or not k.startswith(_CLEAN_ALONE)}
            for name, one in row["scores"].items()
        }
        slim["training"] = {key: value for key, value in row["training"].items() if key != "loss_curve"}
        slim["uncertainty"] = {
            k: v for k, v in row["uncertainty"].items() if k not in ("coverage", "selective_accuracy")
        }
        kept.append(json.dumps(_rounded(slim), ensure_ascii=False) + "\n")
    with atomic_path(page) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return len(kept)


def _cells(rows: Sequence[Row]) -> dict[tuple[str, int, int], dict[str, Row]]:
    """(set, size, seed) -> arm in words -> row."""
    found: dict[tuple[str, int, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["data"], row["size"], row["seed"]][name_of(row["arm"])] = row
    return found


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [" | ".join(["", *line, ""]).strip() for line in (header, ["---"] * len(header), *lines)]


def against(rows: Sequence[Row], recipe: str = RECIPE) -> list[str]:
    """Markdown: the recipe minus every other arm, paired by set, size and seed.

    Mean difference with the 95 % t interval over pairs, and p of the sign-flip test; "worst set" is the least mean
    difference of a set on clean images; "kept" the ratio of the two arms' mean accuracies under the worst attack.
    """
    cells, own, lines = _cells(rows), name_of(recipe), []
    for other in _NAMES.values():
        pairs = [(key, cell[own], cell[other]) for key, cell in cells.items() if own in cell and other in cell]
        if other == own or not pairs:
            continue
        line = [other, str(len(pairs))]
        for key, scale in _MEASURES.items():
            values = [(measure_of(a, key), measure_of(b, key)) for _, a, b in pairs]
            known = [a - b for a, b in values if math.isfinite(a) and math.isfinite(b)]
            mean, half = mean_interval(known)
            digits = 1 if scale == 100 else 3
            text = f"{scale * mean:+.{digits}f} ± {scale * half:.{digits}f}, p {sign_flip_p(known):.2g}"
            if key == "clean":
                sets = {name: [a - b for (k, *_), (a, b) in zip(pairs, values, strict=True) if k[0] == name]
                        for name in dict.fromkeys(k[0] for k, *_ in pairs)}  # fmt: skip
                name = min(sets, key=lambda one: float(np.mean(sets[one])))
                text += f" (worst set: {100 * float(np.mean(sets[name])):+.1f}, {name})"
            if key.startswith("worst"):
                text += f" (kept {np.mean([a for a, _ in values]) / max(np.mean([b for _, b in values]), 1e-9):.2f})"
            line.append(text)
        lines.append(line)
    return _table(["recipe minus", "Pairs", *_TITLES], lines)


def per_set(rows: Sequence[Row]) -> list[str]:
    """Markdown: every arm's means over seeds, a table for each set and size."""
    text: list[str] = []
    groups = dict.fromkeys((row["data"], row["size"]) for row in rows)
    for data, size in sorted(groups):
        chosen = [row for row in rows if (row["data"], row["size"]) == (data, size)]
        lines = []
        for arm in _NAMES.values():
            mine = [row for row in chosen if name_of(row["arm"]) == arm]
            if not mine:
                continue
            line = [arm, str(len(mine))]
            for key, scale in _MEASURES.items():
                mean, half = mean_interval([measure_of(row, key) for row in mine])
                line.append(
                    f"{scale * mean:.{1 if scale == 100 else 3}f} ± {scale * half:.{1 if scale == 100 else 3}f}"
                )
            auroc, ece, size, covered = (
                float(np.mean([measure_of(row, name) for row in mine]))
                for name in ("auroc", "ece", "conformal_size", "conformal_coverage")
            )
            line += [f"{auroc * 100:.1f}", f"{ece * 100:.1f}", f"{size:.2f} ({covered * 100:.0f} %)"]
            line.append(f"{np.mean([row['seconds']['training'] for row in mine]):.0f} s")
            lines.append(line)
        text += [f"**{data}, {size} labels**", ""]
        text += [
            *_table(["Arm", "Seeds", *_TITLES, "AUROC %", "ECE % ↓", "Conformal set ↓ (covers)", "Training"], lines),
            "",
        ]
    return text


def draw(rows: Sequence[Row], path: Path) -> None:
    """A row of dots for each arm, a column for each measure, a colour for each set: means over seeds."""
    figure = require("matplotlib.figure", "cli").Figure(figsize=(11, 4.2), layout="constrained")
    shown = [(key, title) for (key, scale), title in zip(_MEASURES.items(), _TITLES, strict=True) if scale == 100]
    arms = [arm for arm in _NAMES.values() if any(name_of(row["arm"]) == arm for row in rows)]
    axes = figure.subplots(1, len(shown), sharey=True)
    for axis, (key, title) in zip(axes, shown, strict=True):
        for name in dict.fromkeys(row["data"] for row in rows):
            means = [
                np.mean(
                    [measure_of(r, key) for r in rows if r["data"] == name and name_of(r["arm"]) == arm] or [math.nan]
                )
                for arm in arms
            ]
            axis.plot(np.multiply(means, 100), range(len(arms)), "o-", markersize=5, linewidth=0.6, label=name)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(arms)), [arm.replace("*", "").split(":")[0] for arm in arms], fontsize=9)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    """Run what is left of the study, a seed of all sets before the next."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with " + ", ".join(f"{name}.npz" for name in SETS))
    parser.add_argument("output", type=Path, help="folder of the study, new or that of an earlier start")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=None)
    options = parser.parse_args()
    (options.output / "data").mkdir(parents=True, exist_ok=True)
    for name in SETS:
        small = options.output / "data" / f"{name.split('_')[0]}.npz"
        if not small.exists():
            shrink(options.data / f"{name}.npz", small)
    for seeds in range(1, options.seeds + 1):
        for name, flip in SETS.items():
            short = name.split("_")[0]
            arms = [
                f"{arm},flip={flip}" if arm.startswith("standard") else arm.replace(_BASE, f"{_BASE}:{flip}")
                for arm in ARMS
            ]
            small, place = options.output / "data" / f"{short}.npz", options.output / short
            experiment(small, place, options.sizes, seeds, arms, SETTINGS, workers=options.workers, report=False)
        print(f"{seeds} seeds: {merge(options.output, Path('docs/study.jsonl'))} cells in docs/study.jsonl", flush=True)


if __name__ == "__main__":
    main()
