"""Functions that several test files share."""

from __future__ import annotations

import contextlib
import io
import sys
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


def in_process(arguments: list[str | Path]) -> tuple[int, str]:
    from tsynd import cli

    errors = io.StringIO()
    with mock.patch.object(sys, "argv", ["tsynd", *map(str, arguments)]), contextlib.redirect_stderr(errors):
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), errors.getvalue()
    return 0, errors.getvalue()
