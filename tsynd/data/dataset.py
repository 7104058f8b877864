"""Images, labels and sample ids from whatever a caller has: tensors, arrays, Datasets, DataLoaders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from tsynd.data.checks import as_tensor, check_images, check_labels, shape_of, unit_pixels
from tsynd.data.summary import Origin, Summary, summarise
from tsynd.utils.errors import InputError, printable

__all__ = ["Batch", "DataSource", "LabelledBatches", "LabelledImages", "at_once", "check_task", "parts"]


@dataclass(frozen=True)
class Batch:
    """Images [B, C, H, W] or [B, C, D, H, W] in [0, 1], their labels if any, and their ids [B].

    ``start`` [B, ...] are latents where ascents are to start, if not at the images' own.
    """

    images: Tensor
    labels: Tensor | None
    sample_ids: Tensor
    start: Tensor | None = None

    def rows(self, chosen: Tensor | slice) -> Batch:
        """Some of them."""
        labels, start = (None if x is None else x[chosen] for x in (self.labels, self.start))
        return Batch(self.images[chosen], labels, self.sample_ids[chosen], start)

    def padded(self, count: int) -> Batch:
        """The last image repeated until there are ``count``."""
        return self.rows(torch.arange(count).clamp_max(len(self.images) - 1))


@dataclass(frozen=True, eq=False)
class LabelledImages(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images with their labels; a map-style `Dataset` kept in memory.

    Attributes:
        images: [N, C, H, W] or, for volumes, [N, C, D, H, W], uint8 or float in [0, 1].
        labels: int64 [N] (multiclass) or float32 [N, L] of 0 and 1 (multilabel).
        groups: int64 [N], numbers that images of one patient share; None where the source does not tell.

    Raises:
        InputError: the shapes or the dtype are others than these.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        x = self.images
        if x.ndim not in (4, 5) or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise InputError(f"images: {shape_of(x)} {x.dtype}; wanted [N, C, H, W] or [N, C, D, H, W], uint8 or float")
        if len(x) != len(self.labels):
            raise InputError(f"labels: {len(self.labels)} for {len(x)} images; wanted one each")
        if self.groups is not None and self.groups.shape != (len(x),):
            raise InputError(f"groups: {shape_of(self.groups)} for {len(x)} images; wanted one number each")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image, float32 [C, H, W] or [C, D, H, W] in [0, 1], and its label."""
        return unit_pixels(self.images[index]), self.labels[index]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images at int64 `indices` [n] as float32 [n, C, ...] in [0, 1], and their labels."""
        return unit_pixels(self.images[indices]), self.labels[indices]

    def subset(self, indices: Tensor) -> LabelledImages:
        """A copy of the images, labels and groups at int64 `indices` [n], in that order."""
        groups = None if self.groups is None else self.groups[indices]
        return LabelledImages(self.images[indices], self.labels[indices], groups)

    def pixels(self) -> Tensor:
        """All images as float32 [N, C, ...] in [0, 1]."""
        return unit_pixels(self.images)


@dataclass(frozen=True, eq=False, repr=False)
class DataSource:
    """A data set in its splits.

    Attributes:
        name: what it was loaded from, for reports.
        task: "multiclass" or "multilabel".
        class_names: one per class (multiclass) or label (multilabel).
        train: the labelled training images, `train_size` of them or all.
        unlabelled: the whole training split; its labels are not to be used in training.
        val: validation images.
        test: test images.
        train_indices: int64, the positions of `train` in `unlabelled`, ascending.
        origin: what reading left behind besides images.
    """

    name: str
    task: str
    class_names: tuple[str, ...]
    train: LabelledImages
    unlabelled: LabelledImages
    val: LabelledImages
    test: LabelledImages
    train_indices: Tensor
    origin: Origin = field(default_factory=Origin)

    @cached_property
    def summary(self) -> Summary:
        """Counts, what was ignored, exact doubles, grouping and warnings; ``summary.lines()`` shows them."""
        splits = {"train": self.unlabelled, "val": self.val, "test": self.test}
        pairs = {split: (part.images, part.labels) for split, part in splits.items()}
        return summarise(pairs, len(self.train), self.class_names, self.origin)

    def __repr__(self) -> str:
        return "\n".join(self.summary.lines()[:2])

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))
        object.__setattr__(self, "class_names", tuple(map(printable, self.class_names)))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width), or (channels, depth, height, width) of volumes."""
        return tuple(self.train.images.shape[1:])

    @property
    def spatial_dims(self) -> int:
        """2 for pictures, 3 for volumes."""
        return len(self.image_shape) - 1

    @property
    def channels(self) -> int:
        """Channels of an image, 1 or 3."""
        return self.image_shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes (multiclass) or labels (multilabel)."""
        return len(self.class_names)


_IMAGE_KEYS = ("image", "images", "img", "pixel_values")
_LABEL_KEYS = ("label", "labels", "target", "targets")
_VALUES = 2**23  # of float images that go through a network at once, which holds tens of times as many


def check_task(task: str) -> None:
    """Refuse an unknown task.

    Raises:
        InputError: neither "multiclass" nor "multilabel".
    """
    if task not in ("multiclass", "multilabel"):
        raise InputError(f"task: got {task!r}, wanted 'multiclass' or 'multilabel'")


def at_once(values: int, most: int = 256) -> int:
    """How many images of so many values each go through a network at once: at most ``most``, fewer large ones."""
    return max(1, min(most, _VALUES // values))


def parts(images: Tensor, most: int = 256) -> tuple[Tensor, ...]:
    """All images [N, ...] in order, as many at a time as :func:`at_once` says."""
    return torch.split(images, at_once(images[:1].numel() or 1, most))


def _parted(item: Any, where: str) -> tuple[Any, Any]:
    """Image and label (or None) of what a Dataset or DataLoader gives: an image, a tuple or a mapping."""
    if isinstance(item, Mapping):
        found = [next((item[key] for key in keys if key in item), None) for keys in (_IMAGE_KEYS, _LABEL_KEYS)]
        if found[0] is None:
            raise InputError(f"{where}: a mapping of {', '.join(map(str, item))}; wanted the key image (and label)")
        return found[0], found[1]
    if isinstance(item, (tuple, list)):
        if not item:
            raise InputError(f"{where}: an empty {type(item).__name__}; wanted (image, label)")
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _pixels(image: Any, where: str) -> Tensor:
    """An image as a tensor; a Pillow image as [C, H, W]."""
    if not hasattr(image, "getbands"):
        return as_tensor(image, where)
    if image.mode not in ("L", "RGB"):
        raise InputError(f"{where}: a Pillow image of mode {image.mode}; wanted L or RGB")
    return torch.from_numpy(np.array(image).reshape(*reversed(image.size), -1)).movedim(-1, 0)


def _stacked(items: Sequence[Any], start: int, name: str) -> tuple[Tensor, Tensor | None]:
    """Single items as one batch; ``start`` is the first one's number."""
    images, labels = [], []
    for number, item in enumerate(items, start):
        image, label = _parted(item, f"{name}: item {number}")
        images.append(_pixels(image, f"{name}: item {number}"))
        if images[-1].shape != images[0].shape:
            raise InputError(f"{name}: item {number} is {shape_of(images[-1])}, others are {shape_of(images[0])}")
        if label is not None:
            labels.append(as_tensor(label, f"{name}: label of item {number}"))
            if labels[-1].shape != labels[0].shape:
                raise InputError(f"{name}: item {number} has another kind of label than the others")
    if labels and len(labels) < len(images):
        raise InputError(f"{name}: items {start} .. {start + len(items) - 1}: some have a label and some have none")
    return torch.stack(images), torch.stack(labels) if labels else None


class LabelledBatches:
    """Labelled images of every kind as one stream of batches, checked as they come in.

    Args:
        source: a tensor or array [N, C, H, W] or [N, C, D, H, W], uint8 or float in [0, 1]; a pair of such and labels;
            a map-style Dataset, or anything with ``__len__`` and ``__getitem__``, whose items are an image,
            (image, label) or a mapping with ``image`` and ``label`` (its ``batch(indices)`` is used where it has one);
            a DataLoader of such, which stands for one pass over it.
        labels: of tensors and of sources in a known order, [N] or [N, L]; instead of the source's own.
        sample_ids: [N] integers in [0, 2^32); positions when None.
        task: "multiclass" or "multilabel"; None does not look at labels.
        name: the argument's name in messages.
        by_index: make :meth:`at` usable: a DataLoader is read by its Dataset's indices if it gives each item once, else
            one pass of it is kept in memory.

    Attributes:
        count: images; of a DataLoader whose batches have no fixed size what its Dataset holds.
        first: the first image, float32 [1, C, ...].

    Raises:
        InputError: data that cannot be used; also while they are read, naming the image.
    """

    def __init__(
        self,
        source: Any,
        labels: Any = None,
        sample_ids: Any = None,
        task: str | None = "multiclass",
        name: str = "images",
        by_index: bool = False,
    ) -> None:
        if task is not None:
            check_task(task)
        self.name, self._task = name, task
        self._images: Tensor | None = None
        self._labels: Tensor | None = None
        self._ids: Tensor | None = None
        self._items: Any = None
        self._collate: Any = None
        arrays = (Tensor, np.ndarray)
        pair = isinstance(source, (tuple, list)) and len(source) == 2 and all(isinstance(x, arrays) for x in source)
        if pair and source[1].ndim < 3:
            if len(source[0]) != len(source[1]):
                raise InputError(f"{name}: {len(source[0])} images but {len(source[1])} labels")
            source, labels = source[0], source[1] if labels is None else labels
        self._given = labels is not None
        if isinstance(source, arrays):
            self._hold(as_tensor(source, name))
        else:
            self._items, self.count = source, self._length(source)
            if labels is not None or sample_ids is not None:
                self._check_order(source, "labels" if labels is not None else "sample_ids")
            if by_index and not hasattr(source, "__getitem__"):
                self._index()
            if self._images is None:
                self.first = next(self._read(1, probe=True)).images[:1]
        if labels is not None and task is not None:
            self._labels = check_labels(labels, self.count, task, name="labels" if name == "images" else name)
        ids = None if sample_ids is None else as_tensor(sample_ids, "sample_ids")
        if ids is not None and (ids.shape != (self.count,) or ids.is_floating_point() or ids.dtype == torch.bool):
            raise InputError(
                f"sample_ids: got {ids.dtype} {list(ids.shape)}, wanted one integer for each of {self.count} images"
            )
        if ids is not None and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
            raise InputError(f"sample_ids: got {int(ids.min())} .. {int(ids.max())}, wanted 0 .. 2^32 - 1")
        if ids is not None:
            self._ids = ids.long()

    def __len__(self) -> int:
        return self.count

    def _hold(self, pixels: Tensor) -> None:
        if len(pixels) == 0:
            raise InputError(f"{self.name}: holds no images: shape {shape_of(pixels)}; wanted one at least")
        # eight-bit pixels wait as they are: as float they would take four times the memory
        waits = pixels.dtype == torch.uint8 and pixels.ndim in (4, 5)
        self._images = pixels if waits else check_images(pixels, name=self.name)
        self.first, self.count = check_images(self._images[:1], name=self.name), len(pixels)

    def _length(self, source: Any) -> int:
        kind, loader = type(source).__name__, isinstance(source, DataLoader)
        readable = hasattr(source, "__getitem__") or hasattr(source, "__iter__")
        if isinstance(source, (str, bytes, dict, Path)) or not hasattr(source, "__len__") or not readable:
            raise InputError(
                f"{self.name}: got {kind}, wanted a tensor, an array, a pair of tensors (images, labels), a Dataset or"
                " a DataLoader with a length"
            )
        try:
            count = len(source)
            if loader and source.batch_size is not None:
                held = isinstance(source.dataset, IterableDataset)
                count = len(source.dataset if held else source.sampler)
                count -= count % source.batch_size if source.drop_last else 0
            elif loader and source.batch_sampler is not None:
                count = len(source.dataset)
        except TypeError:
            raise InputError(f"{self.name}: got a {kind} of a data set without a length, wanted one with") from None
        if count == 0:
            raise InputError(f"{self.name}: got an empty {kind}: holds no images; wanted at least one")
        return count

    def _check_order(self, source: Any, what: str) -> None:
        """Refuse values by position where the positions are not known."""
        if not isinstance(source, DataLoader):
            if hasattr(source, "__getitem__") or isinstance(source, IterableDataset):
                return
            raise InputError(f"{what}: got some beside a {type(source).__name__}; wanted the images in a tensor")
        drawn: Any = source.sampler if source.batch_sampler is None else source.batch_sampler
        if type(drawn) is BatchSampler:
            drawn = drawn.sampler
        known = isinstance(drawn, SequentialSampler)
        if isinstance(source.dataset, IterableDataset):
            known = source.num_workers < 2
        elif not known and type(drawn).__module__ != "torch.utils.data.sampler":  # of another kind, perhaps in order
            numbers = list(itertools.islice(drawn, self.count + 1))
            if numbers and isinstance(numbers[0], (list, tuple)):
                numbers = [number for batch in numbers for number in batch]
            known = numbers == list(range(self.count))
        if not known:
            raise InputError(
                f"{what}: got some beside a DataLoader that shuffles or draws ({type(drawn).__name__}): which image one"
                f" belongs to is not known; wanted shuffle=False, or {what} in the Dataset's own items"
            )

    def _index(self) -> None:
        """Make a loader readable by index."""
        loader, held = self._items, False
        if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__getitem__") and loader.batch_size is not None:
            sampler = loader.sampler
            once = type(sampler) is SequentialSampler or (
                type(sampler) is RandomSampler
                and not sampler.replacement
                and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
            )
            held = once and type(loader.batch_sampler) is BatchSampler
        if held:
            self._items, self._collate, self.count = loader.dataset, loader.collate_fn, len(loader.dataset)
            return
        whole = list(self._read(256))
        self._hold(torch.cat([batch.images for batch in whole]))
        if self._task is not None and whole[0].labels is not None:
            self._labels = torch.cat([batch.labels for batch in whole if batch.labels is not None])

    def check_labels(self, classes: int, needed: bool) -> None:
        """Labels against the classifier's classes, before work starts."""
        if self._labels is not None:
            self._fitting(self._labels, classes, "labels")
        elif needed and self._images is not None:
            raise InputError("labels: got None, wanted the images' labels, which label_consistency needs")

    def labels(self, classes: int) -> Tensor:
        """All labels on the CPU, int64 [N] in [0, classes) (multiclass) or float32 [N, classes] of 0 and 1.

        Raises:
            InputError: labels that are missing, or do not fit the task or the number of classes.
        """
        own = getattr(self._items, "labels", None) if hasattr(self._items, "batch") else None
        found = [self._labels if self._labels is not None else own if isinstance(own, Tensor) else None]
        if found[0] is None and self._images is None:
            found = [self.at(indices).labels for indices in self.chunks(256)]
        if any(part is None for part in found):
            raise InputError(f"{self.name}: has images but no labels")
        return self._fitting(torch.cat([part for part in found if part is not None]).cpu(), classes, self.name)

    def _fitting(self, labels: Tensor, classes: int, name: str) -> Tensor:
        assert self._task is not None
        try:
            return check_labels(labels, self.count, self._task, classes, name=name)
        except InputError as error:
            raise InputError(f"{error} (the classifier gives {classes} logits)") from None

    def chunks(self, most: int) -> tuple[Tensor, ...]:
        """All indices in order, as many at a time as :func:`at_once` says."""
        return torch.split(torch.arange(self.count), at_once(self.first.numel(), most))

    def at(self, indices: Tensor) -> Batch:
        """The batch at ``indices`` [B]: images float32 [B, C, ...] in [0, 1], labels or None, ids."""
        ids = indices if self._ids is None else self._ids[indices]
        if self._images is not None:
            labels = None if self._labels is None else self._labels[indices]
            return Batch(unit_pixels(self._images[indices]), labels, ids)
        if hasattr(self._items, "batch"):
            images, labels = self._items.batch(indices)
        elif self._collate is not None:
            collated = self._collate([self._items[int(index)] for index in indices])
            images, labels = _parted(collated, self.name)
        else:
            images, labels = _stacked([self._items[int(index)] for index in indices], 0, self.name)
        images, labels = self._checked(images, labels, int(indices[0]))
        return Batch(images, labels if self._labels is None else self._labels[indices], ids)

    def _checked(self, images: Any, labels: Any, start: int) -> tuple[Tensor, Tensor | None]:
        """A batch as read, the first image of which has number ``start``."""
        try:
            images = check_images(images, name=self.name)
            if self._task is None or self._given or labels is None:
                return images, None
            return images, check_labels(labels, len(images), self._task)
        except InputError as error:
            stop = start + (len(images) if hasattr(images, "__len__") else 1)
            raise InputError(f"images {start} .. {stop - 1}: {error}") from None

    def batches(self, size: int) -> Iterator[Batch]:
        """All images in order, at most ``size`` at once."""
        if self._images is None and (self._collate is not None or not hasattr(self._items, "__getitem__")):
            yield from self._read(size)
            return
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            if self._images is None:
                yield self.at(torch.arange(start, stop))
                continue
            part = slice(start, stop)
            labels = None if self._labels is None else self._labels[part]
            ids = torch.arange(start, stop) if self._ids is None else self._ids[part]
            yield Batch(unit_pixels(self._images[part]), labels, ids)

    def _read(self, size: int, probe: bool = False) -> Iterator[Batch]:
        """What a loader (with ``probe``: or a Dataset) gives, gathered into batches of ``size``."""
        if probe and (self._collate is not None or hasattr(self._items, "__getitem__")):
            yield self.at(torch.tensor([0]))
            return
        read = given = 0
        waiting: list[tuple[Tensor, Tensor | None]] = []
        for images, labels in self._parts():
            images, labels = self._checked(images, labels, read)
            if probe:
                yield Batch(images, labels, torch.zeros(len(images), dtype=torch.int64))
                return
            read += len(images)
            waiting.append((images, labels))
            while read - given >= size:
                batch, waiting = self._take(waiting, given, size)
                given += size
                yield batch
        if read > given:
            yield self._take(waiting, given, read - given)[0]
        if read == 0 or (read != self.count and (self._labels is not None or self._ids is not None)):
            raise InputError(f"{self.name}: {read} images came where {self.count} were announced")

    def _parts(self) -> Iterator[tuple[Any, Any]]:
        """Batches of a DataLoader, or of whatever gives batches or single images."""
        source = self._items
        batched = isinstance(source, DataLoader) and source.batch_sampler is not None
        single = isinstance(source, IterableDataset)
        for number, item in enumerate(source):
            images, labels = _parted(item, f"{self.name}: item {number}")
            if not batched:
                images = _pixels(images, f"{self.name}: item {number}")
                labels = None if labels is None else as_tensor(labels, f"{self.name}: label of item {number}")
                of_one = labels is not None and (labels.ndim == 0 or len(labels) != len(images))
                if single or images.ndim == 3 or (images.ndim == 4 and of_one):
                    images, labels = images[None], None if labels is None else labels[None]
            yield images, labels

    def _take(
        self, waiting: list[tuple[Tensor, Tensor | None]], start: int, count: int
    ) -> tuple[Batch, list[tuple[Tensor, Tensor | None]]]:
        """A batch of the first ``count`` waiting images, and what still waits."""
        if len({images.shape[1:] for images, _ in waiting}) > 1:
            raise InputError(f"{self.name}: batches of several image sizes near image {start}; wanted one size")
        images = torch.cat([x for x, _ in waiting])
        own = [y for _, y in waiting if y is not None]
        if own and len(own) < len(waiting):
            raise InputError(f"{self.name}: near image {start} some batches have labels and some have none")
        labels = torch.cat(own) if own else None
        rest = [(images[count:], None if labels is None else labels[count:])]
        if self._labels is not None:
            chosen: Tensor | None = self._labels[start : start + count]
        else:
            chosen = None if labels is None else labels[:count]
        ids = torch.arange(start, start + count) if self._ids is None else self._ids[start : start + count]
        return Batch(images[:count], chosen, ids), rest
