"""What trainings log through Accelerate's trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyClassifier
from helpers import run_tsynd

import tsynd
from tsynd.training.loop import Track

pytest.importorskip("accelerate")
events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    log = events.EventAccumulator(str(folder))
    log.Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_losses_and_scores(tmp_path: Path) -> None:
    images, labels = torch.rand(8, 1, 12, 12), torch.arange(8) % 3
    options: dict[str, Any] = {"iterations": 4, "val": (images, labels), "progress": False}
    model = TinyClassifier()
    report = tsynd.fit_classifier(
        model, (images, labels), track=Track("tensorboard", tmp_path / "logs", "mine"), **options
    )
    found = scalars(tmp_path / "logs" / "mine")
    assert found["loss"] == [(step + 1, pytest.approx(loss)) for step, loss in enumerate(report.losses)]
    assert found["val/accuracy"] == [(4, pytest.approx(report.validation["accuracy"]))]


def test_command(tmp_path: Path) -> None:
    flags = ["--train-size", "12", "--iterations", "2", "--device", "cpu", "--quiet"]
    done = run_tsynd("train", "--data", "phantom", "--output", tmp_path / "out", *flags, "--track", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert len(scalars(tmp_path / "out/logs/classifier")["loss"]) == 2
    for wrong, message in (("paper", "track: got 'paper'"), ("aim", "track: aim is not installed")):
        done = run_tsynd("train", "--data", "phantom", "--output", tmp_path / "new", *flags, "--track", wrong)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "new").exists()
