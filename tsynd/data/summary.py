"""What a data set holds, in lines to show before work starts: counts, what was left out, doubles, grouping."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tsynd.data.readers.pixels import describe

__all__ = ["Origin", "Summary", "summarise"]

_FEW = 10  # test pictures of a class below which no score of it means much


@dataclass(frozen=True)
class Origin:
    """What reading left behind besides images.

    Attributes:
        ignored: how many files of which suffix were no images; empty of sources that are no folders.
        grouping: what keeps images in one split, as ``by patient (12)``; ``none``.
        notes: what a reader noticed.
    """

    ignored: Mapping[str, int] = field(default_factory=dict)
    grouping: str = "none"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What was read.

    Attributes:
        counts: split → images (multilabel: positives) of every class; ``train`` is the whole training split.
        images: split → images.
        labelled: training images that a draw (``train_size``) left with labels.
        class_names: in order.
        shape: of an image, in words.
        origin: what reading left behind.
        doubles: images whose pixels equal those of an earlier one, byte for byte.
        across_classes: of these, how many have several labels among their like.
        across_splits: of these, how many have their like in several splits.
        warnings: what should be known before a score is believed.
    """

    counts: Mapping[str, tuple[int, ...]]
    images: Mapping[str, int]
    labelled: int
    class_names: tuple[str, ...]
    shape: str
    origin: Origin
    doubles: int
    across_classes: int
    across_splits: int
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """Two lines, and one for each warning."""
        total = sum(self.images.values())
        parts = [f"{split} {self.images[split]} ({_some(self.counts[split])})" for split in self.images]
        drawn = f", {self.labelled} of train with labels" if self.labelled < self.images["train"] else ""
        names = ", ".join(map(printable, self.class_names[:12])) + (", ..." if len(self.class_names) > 12 else "")
        facts = [self.shape, f"grouped {self.origin.grouping}" if self.origin.grouping != "none" else "not grouped"]
        if self.origin.ignored:
            kinds = sorted(self.origin.ignored.items(), key=lambda kind: (-kind[1], kind[0]))
            facts.append("ignored: " + ", ".join(f"{count} {printable(kind)}" for kind, count in kinds[:8]))
        if self.doubles:
            where = f"{self.across_classes} across classes, {self.across_splits} across splits"
            facts.append(f"{self.doubles} exact doubles ({where})")
        return [
            f"{total} images read: {', '.join(parts)}{drawn}; classes {names}",
            "; ".join(facts),
            *(f"warning: {text}" for text in self.warnings),
        ]


def _some(counts: tuple[int, ...]) -> str:
    return " / ".join(map(str, counts[:12])) + (" / ..." if len(counts) > 12 else "")


def printable(text: str) -> str:
    """Text without the control characters that a folder's name may hold."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def summarise(
    splits: Mapping[str, tuple[Tensor, Tensor]], labelled: int, class_names: tuple[str, ...], origin: Origin
) -> Summary:
    """Count and compare all images [N, C, ...] with their labels; takes about a second for a gigabyte of pixels."""
    counts = {split: _per_class(labels, len(class_names)) for split, (_, labels) in splits.items()}
    seen: dict[bytes, list[tuple[str, str]]] = {}
    for split, (images, labels) in splits.items():
        for image, label in zip(images, labels.tolist(), strict=True):
            digest = hashlib.blake2b(image.contiguous().numpy().data, digest_size=16).digest()
            seen.setdefault(digest, []).append((split, str(label)))
    several = [like for like in seen.values() if len(like) > 1]
    classes = sum(len(like) - 1 for like in several if len({label for _, label in like}) > 1)
    leaks = sum(len(like) - 1 for like in several if len({split for split, _ in like}) > 1)
    warnings = list(origin.notes)
    for number, count in enumerate(counts["test"]):
        if count < _FEW:
            name = printable(class_names[number])
            warnings.append(f"class {name!r} has {count or 'no'} test images: its scores say little")
    if classes:
        warnings.append(f"exact doubles with different labels: {classes}")
    if leaks:
        warnings.append(f"exact doubles in several splits: {leaks}; test scores are too good")
    return Summary(
        counts,
        {split: len(labels) for split, (_, labels) in splits.items()},
        labelled,
        class_names,
        describe(tuple(splits["train"][0].shape[1:])),
        origin,
        sum(len(like) - 1 for like in several),
        classes,
        leaks,
        tuple(warnings),
    )


def _per_class(labels: Tensor, classes: int) -> tuple[int, ...]:
    counts = labels.bincount(minlength=classes) if labels.ndim == 1 else labels.sum(0).long()
    return tuple(counts.tolist())
