"""Functions that several test files share."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import TinyClassifier
from torch import Tensor

from tsynd import TargetedAugmentation

STD = 0.4


def sharp(images: Tensor, classes: int = 3) -> TinyClassifier:
    torch.manual_seed(2)
    model = TinyClassifier(classes=classes)
    norm = model.body[1]
    norm.momentum = 1.0
    with torch.no_grad():
        model(0.3 * images + 0.4)
        norm.weight.mul_(2)
    return model.eval()


def targeted(autoencoder: Any, **options: Any) -> TargetedAugmentation:
    return TargetedAugmentation(autoencoder, **({"latent_std": STD, "samples": 8} | options))


def run_tsynd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`tsynd ARGUMENTS` in this process, which has torch already."""
    from tsynd import cli

    words = ["tsynd", *map(str, arguments)]
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", words), redirect_stdout(output), redirect_stderr(errors):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


def in_process(arguments: list[str | Path]) -> tuple[int, str]:
    done = run_tsynd(*arguments)
    return done.returncode, done.stderr
