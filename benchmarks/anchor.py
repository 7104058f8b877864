"""``python -m benchmarks.anchor DATA``: the study's loading, training and scores on a task that others measured.

ResNet-18 (MONAI's, random first weights) on all labelled training images of PneumoniaMNIST, 28 × 28 pixels,
20 epochs, beside Doerrich et al. 2024 (MedMNIST+, arXiv 2404.15786, end to end: accuracy 83.1 ± 1.1 %, AUROC
95.0 ± 0.3 %). A line of JSON a seed; docs/study.md has the means.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tsynd.data.load import load_data
from tsynd.evaluation.evaluate import evaluate
from tsynd.training.classifier import fit_classifier
from tsynd.utils.errors import require

__all__ = ["score"]


def score(data: Path, seed: int, epochs: float = 20, batch_size: int = 64) -> dict[str, float]:
    """Accuracy, balanced accuracy and AUROC on the test images."""
    source = load_data(data)
    torch.manual_seed(seed)
    network = require("monai.networks.nets", "models").resnet18(
        spatial_dims=2, n_input_channels=source.channels, num_classes=source.num_classes, conv1_t_stride=2
    )
    steps = max(1, round(epochs * len(source.train) / batch_size))
    fit_classifier(network, source.train, iterations=steps, batch_size=batch_size, seed=seed)
    clean = evaluate(network, source.test, conditions=("clean",))["clean"]
    return {"seed": seed} | {name: clean[name] for name in ("accuracy", "balanced_accuracy", "auroc")}


def main() -> None:
    """Train and score a network a seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anchor", description=__doc__)
    parser.add_argument("data", type=Path, help="pneumoniamnist.npz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=20)
    options = parser.parse_args()
    for seed in range(options.seeds):
        print(json.dumps(score(options.data, seed, options.epochs)), flush=True)


if __name__ == "__main__":
    main()
