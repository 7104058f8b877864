"""Volumes as a radiologist looks at them: orthogonal slices through one place.

The axes [D, H, W] are taken to run from feet to head, from front to back and from the patient's right to left (DICOM's
directions): axial slices lie as seen from the feet, coronal ones as seen from the front, the head is above.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PLANES", "centre", "focus", "slices", "views"]

PLANES = ("axial", "coronal", "sagittal")


def focus(difference: Tensor) -> tuple[int, int, int]:
    """Where two volumes differ most: the middle of the 3 x 3 x 3 voxels of largest mean absolute difference.

    Args:
        difference: [C, D, H, W]; what is not finite counts as none.
    """
    size = difference.abs().nan_to_num(0, 0, 0).float().mean(0)
    # a mean over the neighbours: single voxels are often noise
    near = functional.avg_pool3d(size[None, None], 3, 1, 1)[0, 0]
    z, y, x = torch.unravel_index(near.argmax(), near.shape)
    return int(z), int(y), int(x)


def slices(volume: Tensor, place: tuple[int, int, int]) -> list[Tensor]:
    """The planes of :data:`PLANES` through a place: axial [C, H, W], coronal [C, D, W], sagittal [C, D, H].

    Args:
        volume: [C, D, H, W].
        place: indices along D, H and W.
    """
    z, y, x = place
    return [volume[:, z], volume[:, :, y].flip(1), volume[:, :, :, x].flip(1)]


def views(stages: Sequence[Tensor]) -> list[tuple[str, list[Tensor]]]:
    """What to show of a source, its reconstruction and its targeted image: titles and pictures.

    Args:
        stages: three of [C, H, W], which stay as they are under an empty title; or of [C, D, H, W], cut along
            :data:`PLANES` where the last two differ most.
    """
    if stages[0].ndim == 3:
        return [("", list(stages))]
    place = focus(stages[2] - stages[1])
    cut = [slices(stage, place) for stage in stages]
    titles = [
        f"{name}, slice {at + 1} of {count}" for name, at, count in zip(PLANES, place, stages[0].shape[1:], strict=True)
    ]
    return [(title, [pictures[i] for pictures in cut]) for i, title in enumerate(titles)]


def centre(image: Tensor) -> Tensor:
    """The axial slice [C, H, W] through the middle of a volume [C, D, H, W]; a picture as it is."""
    return image[:, image.shape[1] // 2] if image.ndim == 4 else image
