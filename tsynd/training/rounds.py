"""Offline rounds: the whole training set is turned into extra images several times during a training."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches
from tsynd.training.extra_images import Augmentation, ExtraFunction, ExtraImages, Parts, as_augmentation, as_parts
from tsynd.utils.errors import InputError, check_whole
from tsynd.utils.fingerprint import hash_parts
from tsynd.utils.tensors import hash_tensors, read_tensors, write_tensors

__all__ = ["OfflineRounds"]


class OfflineRounds(Parts):
    """Any augmentations' images of the whole training set, made in rounds and kept.

    At its first call and then at equal distances, one of the augmentations, in turn, is asked for extra images of all
    training images against the classifier as it is. Every call gives what one of the rounds so far, drawn from torch's
    global generator, has of the step's images, to be learnt by the loss that its augmentation says.

    Args:
        data: the training images with their labels, as ``LabelledBatches`` reads them.
        *augmentations: one or more, see :class:`tsynd.Augmentation`.
        rounds: R, at least 1 and at most the steps after the warm-up.
        folder: where images are kept as they are made, a few a file; a killed training takes up what is there. None
            keeps them in memory and in the training's checkpoint.
        at_once: images that an augmentation is given at once, and that lie in one file.

    Attributes:
        made: one per round so far: the extra images, with ``sources`` in the training set.
        repeats: True, for the same images are given many times.

    Raises:
        InputError: an argument that cannot be used.
    """

    repeats = True

    def __init__(
        self,
        data: Any,
        *augmentations: ExtraFunction,
        rounds: int = 3,
        folder: Path | None = None,
        at_once: int = 16,
    ) -> None:
        check_whole("rounds", rounds)
        check_whole("at_once", at_once)
        if not augmentations:
            raise InputError("augmentations: got none, wanted one or more")
        self.parts = tuple(as_augmentation(part) for part in augmentations)
        self.batches = LabelledBatches(data, name="data", by_index=True)
        self.rounds, self.folder, self.at_once = rounds, folder, at_once
        self._settings = [json.dumps(_describe(part)) for part in self.parts]  # now: some change as they work
        self.made: list[list[ExtraImages]] = []
        self.progress = 0.0
        self._ids: Tensor | None = None

    def check(self, classifier: nn.Module, steps: int) -> None:
        """See :meth:`Augmentation.check`."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise InputError("rounds: several processes train together, wanted one for offline rounds")
        if self.rounds > steps:
            raise InputError(f"rounds: got {self.rounds}, wanted at most the {steps} steps after the warm-up")
        for part in self.parts:
            part.check(classifier, math.ceil(len(self.batches) / self.at_once))

    def set_progress(self, fraction: float) -> None:
        """Take the part of the augmented training that is done."""
        self.progress = fraction

    def set_ids(self, ids: Tensor) -> None:
        """See :meth:`Augmentation.set_ids`."""
        self._ids = ids.cpu()

    def state_dict(self) -> dict[str, Any]:
        """The images of the rounds so far, or where they are; and the augmentations' states."""
        held = [[_plain(extra) for extra in made] for made in self.made] if self.folder is None else len(self.made)
        return {"made": held, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            InputError: images that were in the folder then are not there, or damaged.
        """
        held = state["made"]
        self.made = [self._read_round(n) for n in range(held)] if isinstance(held, int) else [
            [ExtraImages(**extra) for extra in made] for made in held
        ]  # fmt: skip
        super().load_state_dict(state)

    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> list[ExtraImages]:
        """A round's images of the step's images."""
        if self._ids is None:
            raise InputError(
                "ids: got none, wanted set_ids(the images' numbers) before each call, as fit_classifier does"
            )
        # the small term: a fraction such as 49 * (1 / 49) must not fall below its whole number
        if len(self.made) < min(self.rounds, math.floor(self.progress * self.rounds + 1e-9) + 1):
            self.made.append(self._round(classifier, images.device))
        chosen = self.made[int(torch.randint(len(self.made), ()))]
        return [given for extra in chosen if len((given := self._of(extra, self._ids)).images)]

    def _of(self, extra: ExtraImages, ids: Tensor) -> ExtraImages:
        """What was made of these images."""
        place = torch.full((len(self.batches),), -1)
        place[extra.made_of()] = torch.arange(len(extra.images))
        sources = (place[ids] >= 0).nonzero()[:, 0]
        rows = place[ids[sources]]
        return ExtraImages(extra.images[rows], extra.labels[rows], extra.loss, extra.weight, sources)

    def _chunks(self) -> tuple[Tensor, ...]:
        return torch.split(torch.arange(len(self.batches)), self.at_once)

    def _round(self, classifier: nn.Module, device: torch.device) -> list[ExtraImages]:
        number = len(self.made)
        part = self.parts[number % len(self.parts)]
        part.set_progress(number / max(self.rounds - 1, 1))
        against = hash_parts(self._settings[number % len(self.parts)], hash_tensors(dict(classifier.state_dict())))
        found: list[list[ExtraImages]] = []
        for index, ids in enumerate(self._chunks()):
            batch = self.batches.at(ids)
            assert batch.labels is not None  # the training has seen them
            key = hash_parts(against, str((number, index)), batch.images.contiguous().numpy().data)
            path = self._path(number, index)
            made = None if path is None else _read(path, key, part)
            if made is None:
                part.set_ids(ids)
                given = as_parts(part(classifier, batch.images.to(device), batch.labels.to(device)))
                made = [_global(extra, ids) for extra in given]
                if path is not None:
                    plain = [_plain(extra) for extra in made]
                    write_tensors(path, {"key": key, "made": plain, "state": part.state_dict()})
            found.append(made)
        return _joined(found)

    def _path(self, number: int, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"round-{number}" / f"{index:05d}.safetensors"

    def _read_round(self, number: int) -> list[ExtraImages]:
        found = []
        for index in range(len(self._chunks())):
            path = self._path(number, index)
            made = None if path is None else _read(path, None, None)
            if made is None:
                raise InputError(f"rounds: {path} is missing or damaged, but the training was past it; start it again")
            found.append(made)
        return _joined(found)


def _plain(extra: ExtraImages) -> dict[str, Any]:
    return {field.name: getattr(extra, field.name) for field in fields(extra)}


def _global(extra: ExtraImages, ids: Tensor) -> ExtraImages:
    """On the CPU, with sources in the training set."""
    sources = ids[extra.made_of().cpu()]
    return ExtraImages(extra.images.detach().cpu(), extra.labels.cpu(), extra.loss, extra.weight, sources)


def _joined(chunks: list[list[ExtraImages]]) -> list[ExtraImages]:
    """The chunks' images, those of one loss and weight together."""
    kinds = dict.fromkeys((extra.loss, extra.weight) for chunk in chunks for extra in chunk)
    joined = []
    for loss, weight in kinds:
        same = [extra for chunk in chunks for extra in chunk if (extra.loss, extra.weight) == (loss, weight)]
        images, labels, sources = (torch.cat(values) for values in zip(
            *((extra.images, extra.labels, extra.made_of()) for extra in same), strict=True))  # fmt: skip
        joined.append(ExtraImages(images, labels, loss, weight, sources))
    return joined


def _describe(value: Any) -> Any:
    """What is plain in an augmentation's settings, so that images made with others are not taken for its own."""
    if is_dataclass(value) and not isinstance(value, type):
        return _describe(asdict(value))
    if isinstance(value, dict):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    name = type(value).__name__
    if not isinstance(value, Augmentation):
        return name
    return [name, {k: _describe(v) for k, v in vars(value).items() if not k.startswith("_")}]


def _read(path: Path, key: str | None, part: Augmentation | None) -> list[ExtraImages] | None:
    """Images that were made before, None where they are not there, damaged, or of something else."""
    held = read_tensors(path)
    if held is None or (key is not None and held.get("key") != key):
        return None
    if part is not None:
        part.load_state_dict(held["state"])
    return [ExtraImages(**extra) for extra in held["made"]]
