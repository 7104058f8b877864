"""Extra images of a training: what an augmentation is, by which loss its images are learnt, and how several combine."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsynd.data.checks import check_labels
from tsynd.utils.errors import InputError, check_choice, check_whole
from tsynd.utils.timing import clock

__all__ = [
    "LOSSES",
    "Alternation",
    "Augmentation",
    "BatchAugmentation",
    "Extra",
    "ExtraFunction",
    "ExtraImages",
    "Mixture",
    "Parts",
    "PerImage",
    "as_augmentation",
    "as_parts",
    "check_extra_labels",
    "image_losses",
    "most_likely",
]

LOSSES = ("label", "consistency")


@dataclass(frozen=True)
class ExtraImages:
    """Images to learn beside a batch of real ones, and how.

    Attributes:
        images: [M, C, H, W] in [0, 1].
        labels: [M] int64 or probabilities [M, K]; multilabel [M, L] in [0, 1].
        loss: ``label``: cross-entropy to the labels; ``consistency``: KL divergence from the classifier's prediction
            for the real image that each was made of (Zhang et al. 2019), whose gradient reaches both.
        weight: of their loss, times ``augmentation_weight``.
        sources: [M] int64, which images of the real batch they were made of; None: its first M.

    Raises:
        InputError: an unknown loss, or a weight that is negative or not finite.
    """

    images: Tensor
    labels: Tensor
    loss: str = "label"
    weight: float = 1.0
    sources: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InputError(f"weight: got {self.weight!r}, wanted a finite number of 0 or more")

    def made_of(self) -> Tensor:
        """``sources``, written out."""
        return torch.arange(len(self.images)) if self.sources is None else self.sources


Extra: TypeAlias = ExtraImages | tuple[Tensor, Tensor] | Sequence[ExtraImages]
"""What an augmentation gives; a pair of images and labels stands for ``ExtraImages(images, labels)``."""

ExtraFunction: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Extra]
"""(classifier, images [B, C, H, W], labels [B, ...]) -> extra images."""


@runtime_checkable
class Augmentation(Protocol):
    """What :func:`tsynd.fit_classifier` asks for extra images.

    A class that derives from this one has only ``__call__`` to write; a plain function will do too. One that gives
    the same images several times may say so by an attribute ``repeats = True``; one that has a method
    ``transform(images, labels)`` changes every step's real images by it first, see :class:`tsynd.InPlace`.
    """

    @abstractmethod
    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor, /) -> Extra:
        """Extra images for one step.

        Args:
            classifier: as it is at that step, in training mode; its mode may be changed.
            images: [B, C, H, W] in [0, 1], the step's real images.
            labels: [B] or [B, L].
        """

    def check(self, classifier: nn.Module, steps: int) -> None:
        """Called before training, to refuse what would only fail later.

        Args:
            classifier: that will be trained, in eval mode.
            steps: number of calls to come.
        """
        return

    def prepare(self, batches: Iterable[Tensor]) -> None:
        """Called before training.

        Args:
            batches: all training images [b, C, H, W], which may be gone through several times.
        """
        return

    def set_progress(self, fraction: float) -> None:
        """Called before each call.

        Args:
            fraction: from 0 at the first augmented step to 1 at the last.
        """
        return

    def set_ids(self, ids: Tensor) -> None:
        """Called before each call.

        Args:
            ids: [B] int64, which images of the training set the next call's are.
        """
        return

    def set_rows(self, rows: Tensor, total: int) -> Tensor | None:
        """Called before each call of a training over several processes.

        Args:
            rows: [B] int64, ascending: which rows of the batch over all processes the next call's images are.
            total: images of that batch.

        Returns:
            The rows that the next call will give images of, or None where that is not known.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the next call depends on besides the arguments: tensors, numbers, texts, lists and dictionaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        return


_METHODS = ("check", "prepare", "set_progress", "set_ids", "set_rows", "state_dict", "load_state_dict")


class _Plain(Augmentation):
    """A function, with whatever methods of an augmentation it has."""

    def __init__(self, function: ExtraFunction) -> None:
        self.function = function
        for name in _METHODS:
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> Extra:
        return self.function(classifier, images, labels)


def as_augmentation(augmentation: ExtraFunction) -> Augmentation:
    """The augmentation itself, or one made of a plain callable.

    Raises:
        InputError: it cannot be called.
    """
    if isinstance(augmentation, Augmentation):
        return augmentation
    if not callable(augmentation):
        raise InputError(
            f"augmentation: got {type(augmentation).__name__}, wanted a callable (classifier, images, labels)"
        )
    return _Plain(augmentation)


def as_parts(made: Extra) -> list[ExtraImages]:
    """What an augmentation gave, as a list.

    Raises:
        InputError: something else than :data:`Extra`.
    """
    if isinstance(made, ExtraImages):
        return [made]
    given: list[Any] = list(made) if isinstance(made, (tuple, list)) else [made]
    if len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        return [ExtraImages(*given)]
    if not all(isinstance(part, ExtraImages) for part in given):
        kinds = [type(part).__name__ for part in given]
        raise InputError(f"augmentation: gave {kinds}, wanted ExtraImages, several of them, or images and labels")
    return given


def image_losses(
    logits: Tensor,
    labels: Tensor,
    loss: str = "label",
    *,
    task: str = "multiclass",
    weights: Tensor | None = None,
    clean: Tensor | None = None,
) -> Tensor:
    """Loss of each image.

    Args:
        logits: [M, C].
        labels: [M] int64 or probabilities [M, C]; multilabel [M, C] in [0, 1].
        loss: one of :data:`LOSSES`.
        task: ``multiclass``, or ``multilabel`` (the mean over labels).
        weights: [C], each class's weight or, with ``multilabel``, each label's where it is present.
        clean: [M, C], logits of the real images, for ``consistency``.

    Returns:
        [M].
    """
    if loss == "consistency":
        assert clean is not None
        if task == "multilabel":
            sure, far = clean.sigmoid(), functional.logsigmoid
            both = [(sure, far(clean) - far(logits)), (1 - sure, far(-clean) - far(-logits))]
            return sum((p * ratio for p, ratio in both), torch.zeros_like(logits)).mean(1)
        each = functional.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)
        if weights is None:
            return each
        return each * (labels.to(weights) @ weights if labels.dim() > 1 else weights[labels.long()])
    if task == "multilabel":
        return functional.binary_cross_entropy_with_logits(
            logits, labels.float(), pos_weight=weights, reduction="none"
        ).mean(1)
    truth = labels.to(logits.dtype) if labels.dim() > 1 else labels.long()
    return functional.cross_entropy(logits, truth, weight=weights, reduction="none")


def check_extra_labels(labels: Tensor, count: int, task: str, classes: int | None) -> None:
    """As :func:`tsynd.data.checks.check_labels`, but multiclass labels may be probabilities [count, classes].

    Raises:
        InputError: labels that do not fit.
    """
    if task == "multiclass" and labels.dim() == 2 and labels.is_floating_point() and labels.shape[1] > 1:
        if len(labels) != count or classes not in (None, labels.shape[1]):
            raise InputError(f"labels: shape {list(labels.shape)}, wanted probabilities [{count}, {classes}]")
    else:
        check_labels(labels, count, task, classes)


def most_likely(labels: Tensor) -> Tensor:
    """Class numbers [M] of multiclass labels, which may be probabilities [M, K]."""
    return labels.argmax(1) if labels.dim() == 2 and labels.shape[1] > 1 else labels.long().reshape(len(labels))


class PerImage:
    """A tensor kept for each image of a training set, on the CPU, between the visits of an augmentation."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def get(self, ids: Tensor, otherwise: Tensor) -> Tensor:
        """What is kept for these images [M], or the row of ``otherwise`` [M, ...]."""
        rows = [self._kept.get(number) for number in ids.tolist()]
        return torch.stack([own if kept is None else kept.to(own) for kept, own in zip(rows, otherwise, strict=True)])

    def put(self, ids: Tensor, values: Tensor) -> None:
        """Keep the rows of values [M, ...]."""
        self._kept |= zip(ids.tolist(), values.detach().cpu().clone(), strict=True)

    def state_dict(self) -> dict[str, Any]:
        """Ids and values."""
        if not self._kept:
            return {}
        return {"ids": torch.tensor(list(self._kept)), "values": torch.stack(list(self._kept.values()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._kept = dict(zip(state["ids"].tolist(), state["values"], strict=True)) if state else {}


class BatchAugmentation(Augmentation):
    """Base of those that turn the first images of a batch into others, at every n-th call.

    Args:
        ratio: extra images per real image of the batch, in (0, 1]; the batch's first are taken.
        every: only calls 0, n, 2n, ... give images, the others none.
        seed: of what is drawn; call n uses seed + n.

    Attributes:
        calls: number of calls so far.
        seconds: wall time spent in them.
        images_made: number of images they gave.
        progress: what :meth:`set_progress` was last told.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(self, ratio: float = 1.0, every: int = 1, seed: int = 0) -> None:
        check_whole("every", every)
        check_whole("seed", seed, 0)
        if not (isinstance(ratio, (int, float)) and 0 < ratio <= 1):
            raise InputError(f"ratio: got {ratio!r}, wanted a number above 0 and at most 1")
        self.ratio, self.every, self.seed = ratio, every, seed
        self.calls = self.images_made = 0
        self.seconds = self.progress = 0.0
        self._rows: tuple[Tensor, int] | None = None
        self._ids: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """[M] int64, which images of the training set the call's are.

        Raises:
            InputError: nobody has said so.
        """
        if self._ids is None:
            raise InputError("persistent: needs set_ids(the images' numbers) before each call, as fit_classifier does")
        return self._ids

    @abstractmethod
    def make(self, classifier: Any, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """The images [M, C, H, W] in [0, 1] made of these.

        Args:
            classifier: as it was given.
            images: [M, C, H, W].
            labels: [M] or [M, L].
            rows: [M] int64, their places in the whole batch, which address what is drawn for them.
        """

    def extra(self, images: Tensor, labels: Tensor) -> Extra:
        """How the made images are to be learnt."""
        return images, labels

    def set_progress(self, fraction: float) -> None:
        """Tell how much of the augmented part of the training is done; ``fit_classifier`` does before each call.

        Args:
            fraction: 0 at the first augmented step, 1 at the last.

        Raises:
            InputError: a fraction outside [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise InputError(f"fraction: got {fraction!r}, wanted a number in [0, 1]")
        self.progress = float(fraction)

    def set_ids(self, ids: Tensor) -> None:
        """See :meth:`Augmentation.set_ids`."""
        self._ids = ids.cpu()

    def set_rows(self, rows: Tensor, total: int) -> Tensor:
        """See :meth:`Augmentation.set_rows`; what is drawn is then addressed by the row."""
        self._rows = rows.cpu(), total
        return rows[:0] if self.calls % self.every else rows[rows < math.ceil(self.ratio * total)]

    def state_dict(self) -> dict[str, Any]:
        """What the next call depends on besides the arguments, for a resumed training."""
        return {"calls": self.calls, "images_made": self.images_made, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.calls, self.images_made = int(state["calls"]), int(state["images_made"])
        self.seconds = float(state["seconds"])

    def __call__(self, classifier: Any, images: Tensor, labels: Tensor) -> Extra:
        """Images for the first ``ratio`` of the batch, or none where ``every`` passes the call over.

        Args:
            classifier: in any mode; modes and ``requires_grad`` are as before afterwards.
            images: [B, C, H, W] in [0, 1].
            labels: [B] or [B, L].

        Returns:
            ceil(ratio * B) images without gradient and their labels.

        Raises:
            InputError: models, images or labels that do not fit.
        """
        images, labels = self.give(classifier, images, labels)
        return self.extra(images, labels)

    def give(self, classifier: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels of a call."""
        (rows, total), self._rows = self._rows or (torch.arange(len(images)), len(images)), None
        rows = rows[rows < math.ceil(self.ratio * total)]
        count = 0 if self.calls % self.every else len(rows)
        self._ids = None if self._ids is None else self._ids[:count]
        images, labels = images[:count].detach(), labels[:count]
        if count:
            start = clock(images.device)
            images = self.make(classifier, images, labels, rows).to(images.dtype)  # whatever autocast made of them
            self.images_made += count
            self.seconds += clock(images.device) - start
        self.calls, self._ids = self.calls + 1, None
        return images, labels


class Parts(Augmentation):
    """Base of those made of others, its ``parts``, which are told the same and kept together."""

    parts: tuple[Augmentation, ...]

    def prepare(self, batches: Iterable[Tensor]) -> None:
        """Prepare every part."""
        for part in self.parts:
            part.prepare(batches)

    def set_progress(self, fraction: float) -> None:
        """Tell every part."""
        for part in self.parts:
            part.set_progress(fraction)

    def state_dict(self) -> dict[str, Any]:
        """The parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


class _Several(Parts):
    """Two or more, between which the images of a training are shared out."""

    def __init__(self, parts: Sequence[ExtraFunction | None]) -> None:
        if len(parts) < 2:
            raise InputError(f"parts: got {len(parts)}, wanted two augmentations or more")
        self.parts = tuple(as_augmentation(part) if part is not None else _Plain(_nothing) for part in parts)
        self.calls = 0
        self._ids: Tensor | None = None

    def check(self, classifier: nn.Module, steps: int) -> None:
        """Check every part."""
        for part, count in zip(self.parts, self._counts(steps), strict=True):
            part.check(classifier, count)

    def _counts(self, steps: int) -> list[int]:
        """How many of so many calls reach each part."""
        return [steps] * len(self.parts)

    def set_ids(self, ids: Tensor) -> None:
        """See :meth:`Augmentation.set_ids`."""
        self._ids = ids

    def state_dict(self) -> dict[str, Any]:
        """The number of calls and the parts' states."""
        return {"calls": self.calls, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        super().load_state_dict(state)
        self.calls = int(state["calls"])


def _nothing(classifier: nn.Module, images: Tensor, labels: Tensor) -> Extra:
    return images[:0], labels[:0]


class Alternation(_Several):
    """Augmentations in turn: call n asks part n modulo their number, each with the loss that it says.

    Args:
        *parts: two or more; None gives no images at its turn.

    Attributes:
        parts: the augmentations.
        calls: number of calls so far.

    Raises:
        InputError: fewer than two, or one that cannot be called.
    """

    def __init__(self, *parts: ExtraFunction | None) -> None:
        super().__init__(parts)

    def _counts(self, steps: int) -> list[int]:
        return [len(range(place, steps, len(self.parts))) for place in range(len(self.parts))]

    def set_rows(self, rows: Tensor, total: int) -> Tensor | None:
        """See :meth:`Augmentation.set_rows`."""
        return self.parts[self.calls % len(self.parts)].set_rows(rows, total)

    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> Extra:
        """What the part whose turn it is gives."""
        part, self.calls = self.parts[self.calls % len(self.parts)], self.calls + 1
        if self._ids is not None:
            part.set_ids(self._ids)
        return part(classifier, images, labels)


class Mixture(_Several):
    """Augmentations side by side: each makes images of its own share of the batch, one block after another.

    Args:
        *parts: two or more; None makes no images of its share.
        shares: one positive number per part, in any unit; None: equal ones.

    Attributes:
        parts: the augmentations.
        shares: they add up to 1.
        calls: number of calls so far.

    Raises:
        InputError: fewer than two parts, one that cannot be called, or shares that do not fit.
    """

    def __init__(
        self,
        *parts: ExtraFunction | None,
        shares: Sequence[float] | None = None,
    ) -> None:
        super().__init__(parts)
        wanted = [1.0] * len(parts) if shares is None else list(shares)
        if len(wanted) != len(parts) or not all(math.isfinite(share) and share > 0 for share in wanted):
            raise InputError(f"shares: got {wanted}, wanted {len(parts)} numbers above 0")
        self.shares = tuple(share / sum(wanted) for share in wanted)
        self._rows: tuple[Tensor, int] | None = None

    def _blocks(self, rows: Tensor, total: int) -> list[tuple[Tensor, int, int]]:
        """For each part: where its images stand among the rows, and its block's start and size in the batch."""
        ends = [round(total * sum(self.shares[: k + 1])) for k in range(len(self.parts))]
        starts = [0, *ends[:-1]]
        return [
            (((rows >= start) & (rows < end)).nonzero()[:, 0], start, end - start)
            for start, end in zip(starts, ends, strict=True)
        ]

    def set_rows(self, rows: Tensor, total: int) -> Tensor | None:
        """See :meth:`Augmentation.set_rows`."""
        self._rows = rows.cpu(), total
        given = []
        for part, (places, start, size) in zip(self.parts, self._blocks(*self._rows), strict=True):
            own = part.set_rows(self._rows[0][places] - start, size) if len(places) else torch.arange(0)
            if own is None:
                return None
            given.append(own + start)
        return torch.cat(given)

    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> Extra:
        """The parts' images, in the parts' order."""
        (rows, total), self._rows = self._rows or (torch.arange(len(images)), len(images)), None
        self.calls += 1
        made: list[ExtraImages] = []
        for part, (places, _, _) in zip(self.parts, self._blocks(rows, total), strict=True):
            if not len(places):
                continue
            if self._ids is not None:
                part.set_ids(self._ids[places])
            there = places.to(images.device)
            found = as_parts(part(classifier, images[there], labels[there]))
            made += [replace(extra, sources=places[extra.made_of()]) for extra in found]
        return made
