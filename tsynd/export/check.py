"""Whether an exported file gives what torch gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tsynd.export.programs import Program
from tsynd.utils.errors import InputError

__all__ = ["check_results"]

_VALUE, _IMAGE = 1e-5, 1e-4  # nats (or probabilities), and pixels in [0, 1]
# Rounding differs between torch and what runs the file, and the ascent amplifies it, without bound where an image
# stands between two hills; so the whole climb is compared loosely, and what it ends with tightly.
_CLIMBED_VALUE, _MOVED = 5e-3, 1e-2


def check_results(program: Program, run_file: Callable[[Mapping[str, Tensor]], Sequence[Tensor]]) -> None:
    """Run the file for one and for five random images and hold it against the recorded function.

    Args:
        program: what was exported.
        run_file: inputs by name -> outputs in the program's order.

    Raises:
        InputError: a result differs.
    """
    for count in (1, 5):
        given = program.examples(count)
        try:
            got = dict(zip(program.outputs, run_file(given), strict=True))
        except Exception as error:  # of kinds of their own: a size of the recording that stands in the file
            raise InputError(f"{program.argument}: a file of it fails on {count} images, wanted any number") from error
        wanted = dict(zip(program.outputs, program.run(*given.values()), strict=True))
        if program.kind == "synthesizer":
            _check_climb(program, given["images"], got, wanted)
            continue
        for name, value in wanted.items():
            _compare(name, got[name], value, _tolerance(program, name, value))


def _tolerance(program: Program, name: str, wanted: Tensor) -> float:
    if name == "images":
        return _IMAGE
    if name in ("latents", "features"):
        return _IMAGE * max(1.0, float(wanted.abs().max()))
    if name == "next_latents":
        assert program.limits is not None
        return _MOVED * program.limits[1]
    return _VALUE


def _check_climb(program: Program, images: Tensor, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert program.measure is not None
    assert program.limits is not None
    with torch.no_grad():
        decoded, value = program.measure(got["latents"])
    _compare("initial_uncertainty", got["initial_uncertainty"], wanted["initial_uncertainty"], _VALUE)
    _compare("targeted", got["targeted"], decoded, _IMAGE)
    _compare("uncertainty", got["uncertainty"], value, _VALUE)
    _compare("uncertainty", got["uncertainty"], wanted["uncertainty"], _CLIMBED_VALUE)
    offset = (got["latents"] - program.encode(images)).flatten(1)
    length = offset.norm(dim=1) if program.limits[2] == "l2" else offset.abs().amax(1)
    _compare("latents", (length / program.limits[1]).clamp_min(1), torch.ones(len(images)), 1e-3)


def _compare(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    same = got.shape == wanted.shape
    error: Any = float((got - wanted).abs().max()) if same else f"shape {list(got.shape)}"
    if not same or not error <= tolerance:
        raise InputError(
            f"model: {name} of the exported file differs from torch's by {error}, wanted at most {tolerance:g}; the "
            "file was deleted"
        )
