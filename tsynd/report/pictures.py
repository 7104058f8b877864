"""Pictures of images: strips of stages, planes of volumes, examples."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError, require

__all__ = [
    "COLUMNS",
    "PLANES",
    "centre",
    "check_counts",
    "difference_scale",
    "draw_examples",
    "focus",
    "inline_png",
    "nats",
    "slices",
    "spread",
    "strip",
    "views",
]


_RED, _BLUE = (178.0, 24.0, 43.0), (33.0, 102.0, 172.0)
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


COLUMNS = ("source", "reconstruction", "targeted", "difference")


def check_counts(count: int, **tensors: Tensor) -> None:
    """Raise :class:`InputError` unless every tensor has ``count`` rows, and that is at least one."""
    for name, tensor in tensors.items():
        if len(tensor) != count or count == 0:
            raise InputError(f"{name}: {len(tensor)} rows for {count} images, wanted as many and at least one")


def spread(labels: Tensor | None, gain: Tensor, count: int) -> list[int]:
    """``count`` indices, even over the classes (multilabel: the first positive label) and over each one's gains."""
    if labels is None:
        classes = torch.zeros(len(gain))
    else:
        classes = labels.cpu() if labels.dim() == 1 else torch.where(labels.any(1), labels.argmax(1), -1).cpu()
    groups = [(classes == c).nonzero()[:, 0] for c in torch.unique(classes)]
    if len(groups) > count:
        groups = [groups[int(i)] for i in np.linspace(0, len(groups) - 1, count)]
    shares = [0] * len(groups)
    while sum(shares) < min(count, sum(map(len, groups))):
        open_ = [g for g in range(len(groups)) if shares[g] < len(groups[g])]
        shares[min(open_, key=lambda g: shares[g])] += 1
    chosen = []
    for number, (members, share) in enumerate(zip(groups, shares, strict=True)):
        order = members[gain[members].argsort()]
        start = (number + 0.5) / len(groups)  # classes with one example each still differ in gain
        chosen += [int(order[int((k + start) / share * len(order))]) for k in range(share)]
    return chosen


def nats(value: Any) -> str:
    """An uncertainty as text, with the digits it needs."""
    x = float(value)
    return f"{x:.4f}" if x == 0 or abs(x) >= 0.001 or not math.isfinite(x) else f"{x:.1e}"


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula, cut to fit beside a picture."""
    return (text if len(text) <= 22 else text[:21] + "…").replace("$", r"\$")


def difference_scale(difference: Tensor) -> float:
    """Symmetric limit of the difference's colours: the 99.5 % quantile, so that one pixel does not pale all others."""
    values = difference.mean(1).abs().flatten().nan_to_num().numpy()
    return max(float(np.quantile(values, 0.995)), 0.01)


def strip(stages: Iterable[Tensor], limit: float) -> list[np.ndarray[Any, Any]]:
    """Source, reconstruction, targeted and the difference of the last two, white at 0, as uint8 [H, W, 3]."""
    source, start, end = ((x if len(x) == 3 else x[:1].expand(3, -1, -1)).permute(1, 2, 0) for x in stages)
    x = ((end - start).mean(2) / limit).clamp(-1, 1).nan_to_num()[..., None]
    difference = 1 + (torch.where(x > 0, torch.tensor(_RED), torch.tensor(_BLUE)) / 255 - 1) * x.abs()
    return [(y.clamp(0, 1) * 255).round().byte().numpy() for y in (source, start, end, difference)]


def draw_examples(
    path: Path,
    sources: Tensor,
    reconstructions: Tensor,
    images: Tensor,
    before: Tensor,
    after: Tensor,
    labels: Sequence[str],
    count: int = 4,
) -> Path:
    """Draw one row per image (three per volume, see :func:`views`), with the report's four columns, as PNG.

    Args:
        path: of the PNG.
        sources: [n, C, H, W] or [n, C, D, H, W] in [0, 1].
        reconstructions: of the same shape.
        images: of the same shape, targeted.
        before: [n], uncertainty of the reconstructions in nats.
        after: [n], of the targeted images.
        labels: n texts.
        count: images; of more, these are spread over the gain from small to large.

    Returns:
        The path of the picture.

    Raises:
        InputError: sizes that do not belong together, or the folder cannot be written to.
        MissingExtraError: matplotlib is not installed.
    """
    stages = [x.detach().cpu() for x in (sources, reconstructions, images)]
    check_counts(len(labels), sources=stages[0], reconstructions=stages[1], images=stages[2])
    before, after = before[: len(labels)].detach().cpu(), after[: len(labels)].detach().cpu()
    rows = list(range(len(labels))) if len(labels) <= count else spread(None, after - before, count)
    limit = difference_scale(stages[2][rows] - stages[1][rows])
    shown = [(row, title, parts) for row in rows for title, parts in views([x[row] for x in stages])]
    figure = require("matplotlib.figure", "cli").Figure(figsize=(7.2, 1.86 * len(shown) + 0.35), facecolor="white")
    axes = figure.subplots(len(shown), 4, squeeze=False)
    for line, (row, title, parts) in zip(axes, shown, strict=True):
        last = not title or title.startswith(PLANES[-1])
        notes = ("", f"{nats(before[row])} nats", f"{nats(after[row])} nats", "") if last else [""] * 4
        for axis, picture, note in zip(line, strip(parts, limit), notes, strict=True):
            axis.imshow(picture, interpolation="nearest" if max(picture.shape) < 128 else "antialiased")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(note, fontsize=9, color="#444444", labelpad=3)
            axis.spines[:].set_color("#cccccc")
        text = f"{_plain(labels[row])}\n{title.split(',')[0]}" if title else _plain(labels[row])
        line[0].set_ylabel(text, fontsize=10, labelpad=6)
    for axis, title in zip(axes[0], (*COLUMNS[:3], f"difference (±{limit:.2f})"), strict=True):
        axis.set_title(title, fontsize=10, fontweight="bold", color="#222222")
    figure.tight_layout(pad=0.5, h_pad=0.6, w_pad=0.6)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return Path(path)


def inline_png(pixels: np.ndarray[Any, Any]) -> str:
    """A picture, uint8 [H, W, 3], as the source of an HTML image."""
    buffer = io.BytesIO()
    require("PIL.Image", "cli").fromarray(np.ascontiguousarray(pixels)).save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
