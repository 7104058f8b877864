"""Sets of images as files: class folders and arrays of bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsynd.data.checks import as_tensor, check_images, check_labels, shape_of
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError, require

__all__ = ["folder_names", "save_class_folders", "to_uint8"]


def to_uint8(images: object) -> np.ndarray[Any, Any]:
    """Images (as for `check_images`, 1 or 3 channels) as uint8 in MedMNIST's layout.

    That is [N, H, W] or [N, H, W, 3], for volumes [N, D, H, W] or [N, D, H, W, 3].

    Raises:
        InputError: as `check_images`, or another number of channels.
    """
    x = check_images(images)
    if x.shape[1] not in (1, 3):
        raise InputError(f"images: {x.shape[1]} channels; wanted 1 (grey) or 3 (RGB)")
    out: np.ndarray[Any, Any] = (x * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return np.ascontiguousarray(out[..., 0] if out.shape[-1] == 1 else out)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Class names as folder names that sort in class order; see :func:`save_class_folders`."""
    folders = [re.sub(r"[^\w.,() +-]|^\.", "_", name) or "_" for name in class_names]
    if folders != sorted(set(folders)):
        digits = len(str(len(folders)))
        folders = [f"{number:0{digits}d}_{name}" for number, name in enumerate(folders)]
    return folders


def save_class_folders(path: str | Path, images: object, labels: object, class_names: Sequence[str]) -> None:
    """Write one PNG per image, `CLASS/000123.png` with its position, as a folder that `load_data` reads.

    Folders bear the class names (odd characters replaced); where these do not sort in class order, the class
    number goes before them, so that `load_data` numbers the classes alike. Classes without an image get none.

    Args:
        path: folder to make; must not exist or be empty.
        images: as for `check_images`, 1 or 3 channels.
        labels: integers [N] (multiclass).
        class_names: the name of every class.

    Raises:
        InputError: bad images or labels, multilabel ones and volumes included, or `path` holds something.
        MissingExtraError: pillow is not installed.
    """
    pillow = require("PIL.Image", "data")
    pixels = to_uint8(images)
    if as_tensor(images, "images").ndim == 5:
        raise InputError(f"images: {len(pixels)} volumes; class folders hold pictures, save volumes as .npz")
    y = as_tensor(labels, "labels")
    if y.ndim == 2 and y.shape[1] > 1:
        raise InputError(f"labels: {shape_of(y)} is multilabel; class folders hold one class per image, use save_npz")
    y = check_labels(y, len(pixels), "multiclass", len(class_names))
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"path: {path} exists and is not an empty folder; wanted a new one")
    folders = folder_names(class_names)
    with atomic_path(path) as temporary:
        for index, (image, label) in enumerate(zip(pixels, y.tolist(), strict=True)):
            folder = temporary / folders[label]
            folder.mkdir(parents=True, exist_ok=True)
            pillow.fromarray(image).save(folder / f"{index:06d}.png")
