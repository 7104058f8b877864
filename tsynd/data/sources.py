"""Labelled images that need not fit in memory, read by ranges of their ids: npz, folders, tables, WebDataset, fsspec.

A source knows its images by position: sample id i is always the same image. It is opened anew in every worker.
"""

from __future__ import annotations

import io
import json
import mmap
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.data import filetree as files
from tsynd.data.checks import channels_first, check_labels, unit_pixels
from tsynd.data.dataset import Batch, LabelledImages
from tsynd.data.filetree import FileTree, Record
from tsynd.data.limits import check_limit
from tsynd.data.load import find_class_names, load_data
from tsynd.data.readers.folders import list_folder
from tsynd.data.readers.image_file import read_image
from tsynd.data.readers.listing import SPLITS, Listing, canonical, read_entry, split_name
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.tables import SUFFIXES as TABLES
from tsynd.data.readers.tables import class_numbers, list_table
from tsynd.utils.errors import InputError, MissingExtraError
from tsynd.utils.fingerprint import hash_parts

__all__ = ["RangeSource", "decode_image", "open_source"]


class RangeSource(ABC):
    """Images by id.

    Attributes:
        count: number of images; ids are 0 .. count - 1.
        task: ``multiclass`` or ``multilabel``.
        class_names: one per class or label; empty where the source has no labels.
        identity: hash of what the source holds, see ``tsynd.data.filetree``.
    """

    count: int
    task: str = "multiclass"
    class_names: tuple[str, ...] = ()
    identity: str

    @abstractmethod
    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images uint8 [n, C, H, W] or [n, C, D, H, W] and labels."""

    def read(self, start: int, stop: int) -> Batch:
        """Images ``start`` to ``stop`` (exclusive), their labels and ids.

        Raises:
            InputError: an image that cannot be read, or is not as the first.
        """
        images, labels = self._read(start, stop)
        return Batch(unit_pixels(images), labels, torch.arange(start, stop))


def open_source(source: str, split: str = "train", options: ReadOptions | None = None) -> RangeSource:
    """Open a source without reading its images.

    Args:
        source: an .npz as :func:`tsynd.load_data` takes it (stored arrays are mapped, compressed ones
            unpacked to a temporary file; every checksum is compared first); a folder or a table of image files as
            there; a WebDataset tar, a folder of tars, or a pattern with ``*`` or ``{000..099}``; any of these
            but tables behind an address such as ``s3://bucket/x.npz``; a MedMNIST name, ``phantom`` or ``phantom3d``.
        split: which of the source's own splits to take; a source without splits is taken whole.
        options: how the files of a folder or table are read; every file must be one image.

    Raises:
        InputError: no such source, or one that cannot be used.
        MissingExtraError: fsspec or the package for a kind of file is needed and not installed.
    """
    options = options or ReadOptions()
    if split not in SPLITS:
        raise InputError(f"split: got {split!r}, wanted {', '.join(SPLITS)}")
    tree = FileTree(source)
    table = tree.is_file and not tree.remote and tree.name.lower().endswith(TABLES)
    if (tree.is_folder and not tree.tars) or table:
        if options.frames is not None or options.slices in ("axial", "coronal", "sagittal"):
            name = "frames" if options.frames is not None else "slices"
            raise InputError(
                f"{name}: not in shards, where every file is one image; wanted volumes, or slices 'PLANE:middle'"
            )
        return _Listed(
            list_table(Path(source).expanduser(), options) if table else list_folder(tree, options), split, options
        )
    if given := options.given():
        name = next(iter(given))
        raise InputError(f"{name}: {given[name]!r}; wanted only with a folder of image files or a table")
    if tree.tars:
        return _Tars(tree, split)
    if tree.is_file and tree.name.endswith(".npz"):
        return _Npz(tree, split)
    if tree.remote:
        raise InputError(f"source: {source!r} was not found, wanted an .npz, a folder of class folders or .tar files")
    data = load_data(source)
    return _Memory(getattr(data, split), data.task, data.class_names, f"{source} {split}")


class _Memory(RangeSource):
    """A set that is loaded whole: a MedMNIST name or the phantom."""

    def __init__(self, data: LabelledImages, task: str, names: tuple[str, ...], text: str) -> None:
        self._data, self.count, self.task, self.class_names = data, len(data), task, names
        content = (data.images.contiguous().numpy().data, data.labels.contiguous().numpy().data)
        self.identity = hash_parts(text, *content)

    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._data.images[start:stop], self._data.labels[start:stop]


class _Npz(RangeSource):
    """The arrays of an .npz, mapped."""

    def __init__(self, tree: FileTree, split: str) -> None:
        where = tree.text
        try:
            with tree.open() as file, zipfile.ZipFile(file) as archive:
                held = canonical({info.filename.removesuffix(".npy"): info for info in archive.infolist()}, where)
                prefix = f"{split}_" if f"{split}_images" in held else ""
                if not prefix and any(f"{name}_images" in held for name in SPLITS):
                    raise InputError(f"{where}: has no {split} split, wanted one of {', '.join(sorted(held))}")
                if missing := [k for k in (f"{prefix}images", f"{prefix}labels") if k not in held]:
                    raise InputError(f"{where}: holds {', '.join(held) or 'nothing'}; missing {', '.join(missing)}")
                used = [held[key] for key in (f"{prefix}images", f"{prefix}labels", "class_names") if key in held]
                # a zip holds the checksum of every array
                self.identity = hash_parts(*(f"{i.filename} {i.file_size} {i.CRC:08x}" for i in used))
                self._images, labels, *given = (np.asanyarray(files.read_array(tree, archive, i)) for i in used)
        except (InputError, MissingExtraError):
            raise
        except Exception as error:  # a damaged zip leads anywhere: encrypted, of an unknown compression, ...
            raise InputError(f"{where}: damaged or no .npz of plain arrays ({error})") from None
        x = self._images
        channels_first(x, f"{where}: images")
        self.count = len(x)
        self.task = "multilabel" if labels.ndim == 2 and labels.shape[1] > 1 else "multiclass"
        self._labels = check_labels(labels, self.count, self.task, name=f"{where}: labels")
        classes = self._labels.shape[1] if self.task == "multilabel" else int(self._labels.max()) + 1
        check_limit("CLASSES", classes, where)
        arrays = {"class_names": given[0]} if given else {}
        self.class_names = find_class_names(arrays, Path(tree.name).stem, classes, where)

    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        part = np.array(self._images[start:stop])  # a copy: the map is read-only
        pages: Any = getattr(self._images, "_mmap", None)
        if hasattr(pages, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)  # what was read is not held in this process
        return torch.from_numpy(channels_first(part, "images")), self._labels[start:stop]


def decode_image(content: bytes, name: str) -> np.ndarray[Any, Any]:
    """An image file's bytes as uint8 [C, H, W]; an .npy may also hold a volume [C, D, H, W], and float32."""
    if name.endswith(".npy"):
        try:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InputError(f"{name}: damaged .npy ({error})") from None
        if array.ndim == 2:
            array = array[None]
        if array.ndim not in (3, 4) or array.dtype.kind not in "uf":
            raise InputError(
                f"{name}: {array.dtype} {list(array.shape)}; wanted [H, W], [C, H, W] or [C, D, H, W], uint8 or float"
            )
        return np.asarray(array, np.uint8 if array.dtype == np.uint8 else np.float32)
    return read_image(content, "picture", name, ReadOptions())[0][0]


def _stack(images: Sequence[np.ndarray[Any, Any]], names: Sequence[str]) -> Tensor:
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape or image.dtype != images[0].dtype:
            raise InputError(
                f"{name}: {list(image.shape)}, while {names[0]} is {list(images[0].shape)}; wanted one size"
            )
    pixels = torch.from_numpy(np.stack(images))
    if pixels.is_floating_point() and not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise InputError(f"{names[0]} .. {names[-1]}: values outside [0, 1]; wanted uint8, or float in [0, 1]")
    return pixels


class _Listed(RangeSource):
    """Image files of a folder or a table; only their names are kept."""

    def __init__(self, listing: Listing, split: str, options: ReadOptions) -> None:
        tree, splits = listing.tree, {entry.split for entry in listing.entries}
        if splits != {""} and split not in splits:
            raise InputError(f"{tree.text}: has no {split} split, wanted one of {', '.join(sorted(splits))}")
        self._entries = [entry for entry in listing.entries if entry.split in ("", split)]
        self._tree, self._options, self.count = tree, options, len(self._entries)
        self.class_names = listing.class_names
        self.task = "multilabel" if isinstance(self._entries[0].label, list) else "multiclass"
        labels = np.array([entry.label for entry in self._entries])
        self._labels = check_labels(labels, self.count, self.task, name=f"{tree.text}: labels")
        self.identity = tree.identity([name for entry in self._entries for name in entry.names])

    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        entries = self._entries[start:stop]
        images = [image for entry in entries for image in read_entry(self._tree, entry, self._options)[0]]
        return _stack(images, [entry.names[0] for entry in entries]), self._labels[start:stop]


class _Tars(RangeSource):
    """WebDataset shards, see :func:`tsynd.data.filetree.index_tar`; of tars named after splits those of ``split``."""

    def __init__(self, tree: FileTree, split: str) -> None:
        self._tree = tree
        starts = {name: split_name(re.split(r"[-_.\d]", name.rpartition("/")[2])[0]) for name in tree.tars}
        several = None not in starts.values() and len(set(starts.values())) > 1
        tars = [name for name in tree.tars if starts[name] == split or not several]
        if not tars:
            held = sorted({str(start) for start in starts.values()})
            raise InputError(f"{tree.text}: has no {split} split, wanted one of {', '.join(held)}")
        indices = {name: files.index_tar(tree, name) for name in tars}
        self._records: list[Record] = [record for records, _ in indices.values() for record in records]
        ignored = sum((left for _, left in indices.values()), Counter[str]())
        if not self._records:
            raise InputError(f"{tree.text}: no sample with an image (.png, .jpg, .npy) in the tars")
        if ignored:
            kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5))
            warnings.warn(f"{tree.text}: left out of the tars: {kinds}", stacklevel=2)
        self._check_counts({name: len(records) for name, (records, _) in indices.items()})
        self.count = len(self._records)
        self.identity = tree.identity(tars)
        label, self.class_names = self._label(self._records[0])
        self._has_labels = label is not None
        self.task = "multilabel" if isinstance(label, list) else "multiclass"
        self._numbers: dict[str, int] = {}
        if isinstance(label, str):  # names of classes, numbered in sorted order as of folders
            _, names = class_numbers(sorted({str(self._label(record)[0]) for record in self._records}))
            self._numbers = {name: number for number, name in enumerate(names)}
            self.class_names = names

    def _check_counts(self, found: dict[str, int]) -> None:
        """Against the manifest that a sharded job left beside its tars."""
        for folder in {name.rpartition("/")[0] for name in found}:
            if not self._tree.exists(f"{folder}/manifest.json"):
                continue
            try:
                shards = json.loads(self._tree.read(f"{folder}/manifest.json"))["shards"]
                wanted = {tar: shard["images"] for shard in shards for tar in shard["files"] if tar.endswith(".tar")}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # another program's
            for name, count in found.items():
                tar = name.rpartition("/")[2]
                if name.rpartition("/")[0] == folder and wanted.get(tar, count) != count:
                    raise InputError(f"{name}: holds {count} samples, manifest.json says {wanted[tar]}; it is damaged")

    def _label(self, record: Record) -> tuple[int | str | list[int] | None, tuple[str, ...]]:
        part = record.cls or record.json
        if part is None:
            return None, ()
        check_limit("JSON", part[1], f"{record.tar}: {record.key}")
        content = self._tree.read_at(record.tar, *part)
        if record.cls is not None:
            text = content.decode("utf-8", "replace").strip()
            return int(text) if text.isascii() and text.isdigit() else text, ()
        try:
            held = json.loads(content)
            label, names = held.get("label"), tuple(map(str, held.get("class_names", ())))
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise InputError(f"{record.tar}: {record.key}.json is no JSON object with a label") from None
        if not (label is None or isinstance(label, (int, str, list))):
            raise InputError(f"{record.tar}: {record.key}.json: label {label!r}; wanted a number, a name or 0 and 1")
        return label, names

    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        records = self._records[start:stop]
        names = [f"{record.tar}/{record.key}{record.suffix}" for record in records]
        contents = (self._tree.read_at(record.tar, *record.image) for record in records)
        images = _stack([decode_image(content, name) for content, name in zip(contents, names, strict=True)], names)
        if not self._has_labels:
            return images, None
        labels = [self._label(record)[0] for record in records]
        if missing := [name for name, label in zip(names, labels, strict=True) if label is None]:
            raise InputError(f"{missing[0]}: has no label, while the first sample has one")
        if self._numbers:
            labels = [self._numbers.get(str(label)) for label in labels]
        elif any(isinstance(label, str) for label in labels):
            raise InputError(f"{names[0]} ..: a label is text, the first one a number; wanted one kind")
        return images, check_labels(labels, len(labels), self.task, name=f"{names[0]} ..: labels")
