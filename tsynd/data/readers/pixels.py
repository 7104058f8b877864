"""From a file's values to finished images: windows, channels, size, eight bits."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tsynd.data.readers.options import ReadOptions
from tsynd.utils.errors import InputError

__all__ = ["Array", "describe", "finish", "quietly", "to_unit", "windowed"]

Array = np.ndarray[Any, Any]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def to_unit(values: Array, low: float, high: float) -> Array:
    """Values as float32 in [0, 1], ``low`` at 0 and ``high`` at 1; zeros where the two are equal."""
    if not high > low:
        return np.zeros(values.shape, np.float32)
    return np.asarray(((values - low) / (high - low)).clip(0, 1), np.float32)


def windowed(values: Array, window: tuple[float, float]) -> Array:
    """Values under a window (centre, width), float32 in [0, 1]."""
    centre, width = window
    return to_unit(values.astype(np.float64), centre - width / 2, centre + width / 2)


def finish(image: Array, options: ReadOptions, where: str) -> Array:
    """An image as the options want it.

    Args:
        image: uint8, or float in [0, 1]; [C, H, W] or [C, D, H, W] with C of 1 or 3.
        options: their ``channels`` and ``image_size``.
        where: the file, for messages.

    Returns:
        uint8 (float is rounded to the nearest of 256 levels), C-contiguous.

    Raises:
        InputError: a value that is not finite.
    """
    if image.dtype != np.uint8 and not np.isfinite(image).all():
        raise InputError(f"{where}: holds a pixel that is not finite")
    wanted = options.channels or len(image)
    if (len(image), wanted) == (1, 3):
        image = np.repeat(image, 3, 0)
    elif len(image) != wanted:
        unit = image / 255 if image.dtype == np.uint8 else image
        image = np.tensordot(np.array(_LUMA), unit, 1)[None]
    if options.image_size is not None and set(image.shape[1:]) != {options.image_size}:
        unit = image / 255 if image.dtype == np.uint8 else image
        image = _fit(torch.from_numpy(np.ascontiguousarray(unit, np.float32)), options.image_size).numpy()
    if image.dtype != np.uint8:
        image = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def _fit(x: Tensor, size: int) -> Tensor:
    """Scale until the longest side is ``size``, then pad to a square or cube."""
    longest = max(x.shape[1:])
    target = [max(1, round(side * size / longest)) for side in x.shape[1:]]
    pads = [end for side in reversed(target) for end in ((size - side) // 2, (size - side + 1) // 2)]
    return functional.pad(_resize(x, target), pads)


def _resize(x: Tensor, target: list[int]) -> Tensor:
    """Linear with antialiasing; torch has it for two axes, so a volume takes two turns: it is separable."""
    plane = {"mode": "bilinear", "antialias": True, "align_corners": False}
    flat = x if x.ndim == 4 else x[None]
    flat = functional.interpolate(flat, target[-2:], **plane)  # type: ignore[arg-type]
    if x.ndim == 3:
        return flat[0]
    if flat.shape[1] != target[0]:
        columns = flat.flatten(2)[:, None]
        flat = functional.interpolate(columns, [target[0], columns.shape[-1]], **plane)  # type: ignore[arg-type]
    return flat.reshape(len(x), *target)


def describe(shape: tuple[int, ...]) -> str:
    """An image's shape [C, H, W] or [C, D, H, W] in words: ``512x512 grey``."""
    return "x".join(map(str, reversed(shape[1:]))) + (" RGB" if shape[0] == 3 else " grey")


class _Silence(logging.Filter):
    """Drops what is logged by a thread that reads a file."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _READING.get()


_READING: ContextVar[bool] = ContextVar("tsynd_reading", default=False)
_SILENCE = _Silence()
_LOCK = threading.Lock()
_inside: dict[str, Any] = {"threads": 0}


@contextmanager
def quietly() -> Iterator[None]:
    """Without a word of the packages that read files: their warnings and logs quote headers, and those name patients.

    Logs of this thread are dropped, of other threads not; warnings of all threads are, for Python's filters are the
    process's: what they were before the first thread came in they are after the last one went out.
    """
    with _LOCK:
        for logger in [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]:
            if isinstance(logger, logging.Logger) and _SILENCE not in logger.filters:
                logger.addFilter(_SILENCE)
        if _inside["threads"] == 0:
            _inside["warnings"] = warnings.catch_warnings()
            _inside["warnings"].__enter__()
            warnings.simplefilter("ignore")
        _inside["threads"] += 1
    token = _READING.set(True)
    try:
        yield
    finally:
        _READING.reset(token)
        with _LOCK:
            _inside["threads"] -= 1
            if _inside["threads"] == 0:
                _inside.pop("warnings").__exit__(None, None, None)
