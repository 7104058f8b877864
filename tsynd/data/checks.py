"""Checks of arguments that many parts take: one line that names the argument, what came and what is wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.utils.errors import InputError

__all__ = ["as_tensor", "channels_first", "check_images", "check_labels", "shape_of", "unit_pixels"]


def check_images(images: object, *, name: str = "images") -> Tensor:
    """Turn an image argument into a tensor the library works on.

    Args:
        images: tensor or array [N, C, H, W] or, for volumes, [N, C, D, H, W], N > 0: uint8, or float in [0, 1]
            (to 1e-4, then clamped).
        name: the argument's name, for messages.

    Returns:
        float32 of the same shape in [0, 1] on the same device; may share memory with `images`.

    Raises:
        InputError: wrong type, dtype, shape or range, or a pixel that is not finite.
    """
    x = as_tensor(images, name)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise InputError(f"{name}: dtype {x.dtype}; wanted uint8, or float in [0, 1]")
    if x.ndim not in (4, 5) or x.numel() == 0:
        hint = "; add the channel or batch axis with unsqueeze" if x.ndim in (2, 3) else ""
        raise InputError(f"{name}: shape {shape_of(x)}; wanted [N, C, H, W] or [N, C, D, H, W] with N > 0{hint}")
    if x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        wanted = "[N, C, H, W]" if x.ndim == 4 else "[N, C, D, H, W]"
        raise InputError(f"{name}: shape {shape_of(x)} looks channels-last; wanted {wanted}")
    if x.dtype == torch.uint8:
        return unit_pixels(x)
    x = x.float()
    low, high = (v.item() for v in x.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise InputError(f"{name}: a pixel of image {bad} is not finite; wanted [0, 1]")
    if low < -1e-4 or high > 1 + 1e-4:
        raise InputError(f"{name}: values from {low:g} to {high:g}; wanted [0, 1] (or uint8)")
    return x.clamp(0, 1) if low < 0 or high > 1 else x


def check_labels(
    labels: object, count: int, task: str, num_classes: int | None = None, *, name: str = "labels"
) -> Tensor:
    """Turn a label argument into a tensor the library works on.

    Args:
        labels: multiclass: integers [count] or [count, 1]; multilabel: 0 and 1 [count, L], any dtype.
        count: number of images.
        task: "multiclass" or "multilabel".
        num_classes: number of classes, or L; None: not checked.
        name: the argument's name, for messages.

    Returns:
        int64 [count] (multiclass) or float32 [count, L] (multilabel), on the same device.

    Raises:
        InputError: wrong type, dtype, shape or range, or an unknown task.
    """
    if task not in ("multiclass", "multilabel"):
        raise InputError(f"task: {task!r}; wanted 'multiclass' or 'multilabel'")
    y = as_tensor(labels, name)
    multiclass = task == "multiclass"
    if multiclass and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != (1 if multiclass else 2) or len(y) != count or count == 0:
        wanted = f"[{count}]" if multiclass else f"[{count}, L]"
        raise InputError(f"{name}: shape {shape_of(y)}; wanted {wanted} for {count} images ({task}), at least one")
    if not multiclass:
        if bool(((y != 0) & (y != 1)).any()):
            raise InputError(f"{name}: values other than 0 and 1; wanted only these ({task})")
        if num_classes not in (None, y.shape[1]):
            raise InputError(f"{name}: {y.shape[1]} labels per image; wanted {num_classes}")
        return y.float()
    if y.is_floating_point() or y.is_complex():
        raise InputError(f"{name}: dtype {y.dtype}; wanted integers (class numbers)")
    y = y.long()
    low, high = int(y.min()), int(y.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        top = "" if num_classes is None else f" to {num_classes - 1}"
        raise InputError(f"{name}: values from {low} to {high}; wanted 0{top or ' or more'}")
    return y


def as_tensor(values: object, name: str) -> Tensor:
    """A tensor of numbers, sharing memory where it can."""
    if isinstance(values, Tensor):
        # a subclass, such as MONAI's MetaTensor, would run its own rules in every operation
        with torch._C.DisableTorchFunctionSubclass():
            return values.detach().as_subclass(Tensor)
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "buif":
            raise TypeError(f"dtype {array.dtype}")
        if array.dtype.kind in "iu" and array.dtype != np.uint8:
            array = array.astype(np.int64)
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {type(values).__name__} ({error}); wanted a tensor or array of numbers") from error


def channels_first(array: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    """The images of a MedMNIST-style file as the library holds them.

    Args:
        array: uint8 pictures [N, H, W] or [N, H, W, 1 or 3], or volumes [N, D, H, W] or [N, D, H, W, 1 or 3]. Four
            axes are a volume's unless the last one holds 1 or 3 channels.
        where: what to call the array in messages.

    Returns:
        uint8 [N, C, H, W] or [N, C, D, H, W], a view of the array.

    Raises:
        InputError: another dtype or shape.
    """
    x = array if array.ndim in (4, 5) and array.shape[-1] in (1, 3) else array[..., None]
    # [N, 3, H, W] is not taken for volumes of three slices, nor [N, H, W, 4] with transparency for four columns
    alpha = array.shape[-1] in (2, 4) and min(array.shape[1:3], default=0) >= 16
    strange = array.ndim == 4 and x.ndim == 5 and (array.shape[1] in (1, 3) or alpha)
    if array.dtype != np.uint8 or x.ndim not in (4, 5) or x.shape[-1] not in (1, 3) or x.size == 0 or strange:
        raise InputError(
            f"{where}: {array.dtype} {list(array.shape)}; wanted uint8 [N, H, W] or [N, H, W, 3], or volumes"
            " [N, D, H, W], N > 0"
        )
    return np.moveaxis(x, -1, 1)


def unit_pixels(x: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def shape_of(x: Tensor) -> list[int]:
    """The shape as a plain list, for messages."""
    return list(x.shape)
