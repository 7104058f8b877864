"""Labelled files: where they are listed, and all of them read into the arrays of a MedMNIST-style file."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from tsynd.data.filetree import FileTree
from tsynd.data.readers.image_file import START, Image, kind_of, read_image, read_volume
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.pixels import Array, describe
from tsynd.utils.errors import InputError

__all__ = ["SPLITS", "Entry", "Listing", "canonical", "gather", "read_entries", "read_entry", "split_name"]

SPLITS = ("train", "val", "test")
_SPLIT = re.compile(
    r"(?:(?P<train>train|training)|(?P<val>val|valid|validation|dev|development)|(?P<test>test|testing))"
    r"(?:[ _.-]?(?:set|data|dataset|images?|imgs?|split))?",
    re.IGNORECASE,
)


def split_name(text: str) -> str | None:
    """``train``, ``val`` or ``test`` of what people call them, in any case; None of anything else."""
    found = _SPLIT.fullmatch(text.strip())
    return None if found is None else found.lastgroup


def canonical(arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arrays by name, the splits' called ``train_images``, ``val_labels``, ... whatever the file calls them.

    Raises:
        InputError: two of one split.
    """
    out: dict[str, Any] = {}
    for name, array in arrays.items():
        start, _, end = name.rpartition("_")
        split = split_name(start) if end.lower() in ("images", "labels") else None
        key = f"{split}_{end.lower()}" if split else name
        if key in out:
            raise InputError(f"{where}: holds {key} twice, under two names; wanted one")
        out[key] = array
    return out


@dataclass(frozen=True)
class Entry:
    """A file, or the slices of a series, with its label: a number, or 0 and 1 per label.

    Attributes:
        names: in the source's tree; several are the slices of one volume.
        label: class number, or a list of 0 and 1.
        split: ``train``, ``val``, ``test``, or empty where the source has no splits.
        patient: where the source tells it; never shown nor kept.
        folder: inside the class folder, which may be a patient's; None where there is none.
    """

    names: tuple[str, ...]
    label: int | list[int]
    split: str = ""
    patient: str | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Listing:
    """Every labelled file of a source, in a fixed order.

    Attributes:
        ignored: how many files of which suffix are no images.
        by_folder: take an entry's folder for its patient where nothing else tells it.
    """

    tree: FileTree
    entries: list[Entry]
    class_names: tuple[str, ...]
    ignored: Counter[str] = field(default_factory=Counter)
    by_folder: bool = False


def read_entry(tree: FileTree, entry: Entry, options: ReadOptions) -> Image:
    """The images of an entry, and the patient."""
    paths = [tree.path(name) for name in entry.names]
    if options.inside and not tree.remote:
        root = os.path.realpath(tree.path(""))
        for path in paths:
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise InputError(f"{path}: lies outside of {root}; wanted files inside alone (inside=True)")
    if len(paths) > 1:
        contents = ((tree.read(name), path) for name, path in zip(entry.names, paths, strict=True))
        return read_volume(contents, str(PurePosixPath(paths[0]).parent), options)
    content = tree.read(entry.names[0])
    kind = kind_of(entry.names[0], lambda: content[:START])
    if kind is None:
        raise InputError(f"{paths[0]}: no image file that tsynd reads (PNG, JPEG, BMP, TIFF, DICOM, NIfTI)")
    return read_image(content, kind, paths[0], options)


def read_entries(listing: Listing, options: ReadOptions) -> Iterator[tuple[Entry, Image]]:
    """Every entry with its images."""
    for entry in listing.entries:
        yield entry, read_entry(listing.tree, entry, options)


def gather(
    read: Iterable[tuple[Entry, Image]], class_names: Iterable[str], options: ReadOptions, by_folder: bool = False
) -> tuple[dict[str, Array], str]:
    """The arrays of a MedMNIST-style file, and ``groups``: numbers that images of one patient share; and of what kind.

    Groups are left out where every image would be one of its own. The kind is a phrase, such as ``by patient (12)``.

    Raises:
        InputError: images of several sizes or colour modes.
    """
    images: dict[str, list[Array]] = {}
    labels: dict[str, list[Any]] = {}
    groups: dict[str, list[int]] = {}
    numbers: dict[tuple[str, str], int] = {}  # in order of appearance, so that a split does not depend on identifiers
    first: tuple[str, tuple[int, ...]] | None = None
    for entry, (found, patient) in read:
        name = entry.names[0]
        patient = entry.patient if entry.patient is not None else patient
        key = ("file", name) if patient is None else ("patient", patient)
        if patient is None and by_folder and entry.folder is not None:
            key = ("folder", entry.folder)
        number = numbers.setdefault(key, len(numbers))
        for image in found:
            first = first or (PurePosixPath(name).name, image.shape)
            if image.shape != first[1]:
                raise InputError(
                    f"{name}: {describe(image.shape)}, while {first[0]} is {describe(first[1])}; wanted one size and "
                    "one colour mode (image_size=N, --image-size resizes; channels=1 or 3, --channels converts)"
                )
            images.setdefault(entry.split, []).append(image)
            labels.setdefault(entry.split, []).append(entry.label)
            groups.setdefault(entry.split, []).append(number)
    arrays: dict[str, Array] = {"class_names": np.array(list(class_names))}
    grouped = options.group != "none" and sum(map(len, groups.values())) > len(numbers)
    kinds = Counter(kind for kind, _ in numbers)
    grouping = " and ".join(f"by {kind} ({count})" for kind, count in kinds.most_common()) if grouped else "none"
    for split, found in images.items():
        prefix = f"{split}_" if split else ""
        arrays[f"{prefix}images"] = np.moveaxis(np.stack(found), 1, -1)
        arrays[f"{prefix}labels"] = np.array(labels[split])
        if grouped:
            arrays[f"{prefix}groups"] = np.array(groups[split])
    return arrays, grouping
