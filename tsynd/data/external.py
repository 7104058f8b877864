"""A test set from elsewhere, as of another hospital: all its images, under the class names of a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.data.checks import channels_first, check_labels
from tsynd.data.dataset import DataSource, LabelledImages
from tsynd.data.load import find_class_names, read_source
from tsynd.data.readers.listing import SPLITS
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.tables import SUFFIXES as TABLES
from tsynd.utils.errors import InputError

__all__ = ["External", "as_trained", "load_test", "parse_class_map"]


def as_trained(options: ReadOptions, image_shape: Sequence[int] | None) -> ReadOptions:
    """Size and colour of training images [C, H, W] or [C, D, H, W] where the caller asks for no others."""
    if image_shape is None:
        return options
    channels, *sizes = image_shape
    changes: dict[str, Any] = {}
    if options.image_size is None and len(set(sizes)) == 1:
        changes["image_size"] = sizes[0]
    if options.channels is None and channels in (1, 3):
        changes["channels"] = channels
    if len(sizes) == 3:
        changes["volumes"] = True
    return replace(options, **changes)


def parse_class_map(texts: Sequence[str]) -> dict[str, str]:
    """``THEIRS=OURS`` as a mapping; ``THEIRS=`` leaves that class out.

    Raises:
        InputError: no such form.
    """
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (theirs, equals, _) in zip(texts, pairs, strict=True) if not (theirs and equals)]:
        raise InputError(f"class_map: got {wrong[0]!r}, wanted THEIRS=OURS, as normal=NORMAL")
    return {theirs: ours for theirs, _, ours in pairs}


@dataclass(frozen=True)
class External:
    """Test sets from elsewhere that stand beside a data set's own.

    Attributes:
        sources: name, for people → what :func:`load_test` takes.
        class_map: of all of them.
    """

    sources: Mapping[str, Any] = field(default_factory=dict)
    class_map: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, texts: Sequence[str] | None, class_map: Sequence[str] | None) -> External:
        """From ``NAME=DATA`` and ``THEIRS=OURS``.

        Raises:
            InputError: no such forms, a name twice, or a map without data.
        """
        pairs = [text.partition("=") for text in texts or ()]
        sources = {name: source for name, _, source in pairs}
        if len(sources) < len(pairs) or any(not (name and source) or ":" in name for name, _, source in pairs):
            raise InputError(f"test_data: got {' '.join(texts or ())!r}, wanted NAME=DATA, each name once")
        if class_map and not sources:
            raise InputError("class_map: got one without test data, wanted --test-data NAME=DATA too")
        return cls(sources, parse_class_map(class_map or ()))

    def load(self, source: DataSource, reading: ReadOptions) -> dict[str, LabelledImages]:
        """All of them, in the classes and the shape of a data set; files are read as its files are."""
        shared: dict[str, Any] = {"task": source.task, "class_map": self.class_map, "image_shape": source.image_shape}
        return {
            name: load_test(found, source.class_names, reading=reading if _of_files(found) else None, **shared)
            for name, found in self.sources.items()
        }


def load_test(
    source: str | Path | Any,
    class_names: Sequence[str],
    *,
    task: str = "multiclass",
    class_map: Mapping[str, str] | None = None,
    split: str = "all",
    image_shape: Sequence[int] | None = None,
    reading: ReadOptions | None = None,
) -> LabelledImages:
    """Images to test a classifier on; the source needs neither training images nor all of the classes.

    Args:
        source: as :func:`tsynd.load_data` takes it.
        class_names: the classifier's.
        task: the classifier's, "multiclass" or "multilabel".
        class_map: the source's class name → the classifier's; an empty one leaves these images out. Names that are
            equal need none.
        split: ``all``, or one that the source has.
        image_shape: of the classifier's training images; files are brought to it.
        reading: how files are read.

    Returns:
        uint8 images, labels in the classifier's numbers, and groups where the source knows patients.

    Raises:
        InputError: a class of the source that is none of the classifier's, or images of another shape.
    """
    options, known = reading or ReadOptions(), dict(class_map or {})
    if _of_files(source):
        options = as_trained(options, image_shape)
    arrays, name, where, _ = read_source(source, options, whole=False)
    held = [prefix for prefix in ("", *SPLITS) if f"{prefix}_images".lstrip("_") in arrays]
    if split != "all" and split not in held:
        raise InputError(f"split: got {split!r}, wanted all{''.join(f', {one}' for one in held if one)}")
    images, labels, groups = [], [], []
    for prefix in held if split == "all" else [split]:
        keys = [f"{prefix}_{part}".lstrip("_") for part in ("images", "labels", "groups")]
        if keys[1] not in arrays:
            raise InputError(f"{where}: holds {keys[0]} without {keys[1]}; wanted labels to test on")
        images.append(torch.from_numpy(channels_first(arrays[keys[0]], f"{where}: {keys[0]}")))
        found = arrays[keys[1]]
        kind = "multilabel" if found.ndim == 2 and found.shape[1] > 1 else "multiclass"
        if kind != task:
            raise InputError(f"{where}: {keys[1]} are {kind}; wanted {task} labels as the classifier's")
        labels.append(check_labels(found, len(images[-1]), task, name=f"{where}: {keys[1]}"))
        groups += [torch.from_numpy(arrays[keys[2]])] if keys[2] in arrays else []
    if not images:
        raise InputError(f"{where}: holds {', '.join(arrays) or 'nothing'}; wanted images and labels")
    if len({tuple(one.shape[1:]) for one in images}) > 1 or (
        image_shape is not None and list(images[0].shape[1:]) != list(image_shape)
    ):
        shapes = ", ".join(str(list(one.shape[1:])) for one in images)
        raise InputError(
            f"{where}: images of {shapes}; wanted {list(image_shape or images[0].shape[1:])}, as trained on"
        )
    pixels, numbers = torch.cat(images), torch.cat(labels)
    count = numbers.shape[1] if task == "multilabel" else int(numbers.max()) + 1
    theirs = find_class_names(arrays, name, count, where)
    places = _places(theirs, known, class_names, where)
    kept, numbers = _renumbered(numbers, places, len(class_names), task, where)
    patients = torch.cat(groups)[kept] if groups and sum(map(len, groups)) == len(kept) else None
    return LabelledImages(pixels[kept].contiguous(), numbers, patients)


def _of_files(source: Any) -> bool:
    """Whether a source is a folder or a table of files, which options of reading are for."""
    path = Path(str(source)).expanduser()
    return path.is_dir() or path.suffix.lower() in TABLES


def _places(theirs: Sequence[str], known: Mapping[str, str], names: Sequence[str], where: str) -> list[int | None]:
    """The number of each class among the classifier's; None for one that is left out."""
    ours = [known.get(one, one) for one in theirs]
    if wrong := [one for one, name in zip(theirs, ours, strict=True) if name and name not in names]:
        alike = {name.casefold(): name for name in names}
        wanted = " ".join(repr(f"{one}={alike.get(one.casefold(), 'NAME')}") for one in wrong)
        kind, verb = ("classes", "are") if len(wrong) > 1 else ("class", "is")
        raise InputError(
            f"{where}: {kind} {', '.join(map(repr, wrong))} {verb} none of the classifier's ({', '.join(names)}); "
            f"wanted --class-map {wanted} (class_map in Python; '{wrong[0]}=' leaves its images out)"
        )
    return [list(names).index(name) if name else None for name in ours]


def _renumbered(labels: Tensor, places: list[int | None], count: int, task: str, where: str) -> tuple[Tensor, Tensor]:
    """Which images are kept (bool [N]) and the labels of these, by the classifier's numbers."""
    if task == "multilabel":
        columns = [place for place in places if place is not None]
        if sorted(columns) != list(range(count)):
            raise InputError(f"{where}: has {len(set(columns))} of the classifier's {count} labels; wanted each once")
        found = torch.zeros(len(labels), count)
        for column, place in enumerate(places):
            if place is not None:
                found[:, place] = labels[:, column]
        return torch.ones(len(labels), dtype=torch.bool), found
    numbers = torch.from_numpy(np.array([-1 if place is None else place for place in places]))[labels]
    kept = numbers >= 0
    if not bool(kept.any()):
        raise InputError(f"{where}: no image is left under class_map; wanted one at least")
    return kept, numbers[kept]
