"""Labelled images in their splits, from MedMNIST-style files, folders, tables, datasets objects and names."""

from __future__ import annotations

import difflib
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsynd.data import medmnist
from tsynd.data.checks import channels_first, check_labels, shape_of
from tsynd.data.dataset import DataSource, LabelledImages
from tsynd.data.filetree import FileTree
from tsynd.data.limits import check_expansion, check_limit
from tsynd.data.phantom import phantom
from tsynd.data.phantom3d import phantom3d
from tsynd.data.readers.folders import list_folder
from tsynd.data.readers.huggingface import is_dataset, read_dataset
from tsynd.data.readers.listing import SPLITS, Listing, canonical, gather, read_entries
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.tables import SUFFIXES as TABLES
from tsynd.data.readers.tables import list_table
from tsynd.data.splits import check_apart, split, stratified_order
from tsynd.data.summary import Origin
from tsynd.utils.errors import InputError

__all__ = ["find_class_names", "load_data", "read_source"]

Arrays = dict[str, np.ndarray[Any, Any]]

_DIM = 26  # of 255: below a tenth of the range
_PHANTOMS = {"phantom": phantom, "phantom3d": phantom3d}


def load_data(
    source: str | Path | Any,
    *,
    train_size: int | None = None,
    seed: int = 0,
    **reading: Any,
) -> DataSource:
    """Load a data set.

    Args:
        source: one of
            - a MedMNIST-style .npz: `{train,val,test}_{images,labels}`, or `images` and `labels` alone; uint8
              images [N, H, W] or [N, H, W, 3], or volumes [N, D, H, W]; labels [N] or [N, 1], or [N, L] of 0 and 1
              (multilabel); optionally `class_names`, strings;
            - a folder: train/ val/ test/ (or Training/, valid/, ...) with class folders, or class folders alone, with
              PNG, JPEG, BMP, TIFF (8 or 16 bits), DICOM or NIfTI files at any depth below; classes are numbered in
              the sorted order of their names;
            - a table, .csv, .tsv or .parquet, with the columns `path`, `label`, optionally `split` and `patient`;
            - a Hugging Face `datasets.Dataset` or `DatasetDict` with an image and a label column;
            - a MedMNIST set, as `pneumoniamnist`, `bloodmnist_64` or `nodulemnist3d`: downloaded once, into the folder
              that the variable TSYND_DATA names or the user's cache;
            - `phantom` or `phantom:SIZE`, pictures of cells; `phantom3d` or `phantom3d:SIZE`, volumes of nodules.

            Without a val split 15 % of train becomes it; without any split the shares are 70/15/15. Where the source
            tells patients apart, none has images in two splits. Images are held in 8 bits.
        train_size: how many labelled training images to draw, with the class shares kept and at least one of
            every class; a smaller draw of the same seed is contained in a larger one. Of a class, every patient gives
            one image before any gives a second. None: all.
        seed: seeds that draw and any splitting, never the images themselves.
        reading: how folders, tables and `datasets` objects are read: the fields of :class:`tsynd.ReadOptions`, such as
            `image_size`, `channels`, `window` or `group`.

    Raises:
        InputError: the source or an argument cannot be used.
        MissingExtraError: a package is not installed: pillow (pictures), pydicom, nibabel, pyarrow (Parquet), pooch
            (downloads).
    """
    if unknown := set(reading) - set(ReadOptions.__dataclass_fields__):
        raise TypeError(f"load_data() got an unexpected keyword argument {min(unknown)!r}")
    if seed < 0:
        raise InputError(f"seed: {seed}; wanted 0 or more")
    arrays, name, where, origin = read_source(source, ReadOptions(**reading))
    return _assemble(arrays, name, where, train_size, seed, origin)


def read_source(source: str | Path | Any, options: ReadOptions, whole: bool = True) -> tuple[Arrays, str, str, Origin]:
    """The arrays of a source as those of a MedMNIST-style file, its name, where it lies and what reading left behind.

    Args:
        source: see :func:`load_data`.
        options: how files are read.
        whole: ask for what a data set to train on needs: two classes, and the splits train and test or none.
    """
    if is_dataset(source):
        read, names, name = read_dataset(source, options)
        arrays, grouping = gather(read, names, options)
        return arrays, name, "source", Origin(grouping=grouping)
    text = str(source)
    known, path = text.lower(), Path(source).expanduser()
    kind, _, size = known.partition(":")
    is_name = isinstance(source, str)
    listed = path.is_dir() or (path.is_file() and path.suffix.lower() in TABLES)
    if not listed and (given := options.given()):
        name = next(iter(given))
        raise InputError(f"{name}: {given[name]!r}; wanted only with a folder of image files, a table or a Dataset")
    if is_name and kind in _PHANTOMS:
        if size and not size.isdecimal():
            raise InputError(f"source: {text!r}; wanted '{kind}' or '{kind}:SIZE', such as '{kind}:64'")
        return _PHANTOMS[kind](int(size or 28)), text, text, Origin()
    if is_name and known in medmnist.MD5:
        path = medmnist.download(known)
        return _read_npz(path), known, str(path), Origin()
    if listed:
        listing = list_folder(FileTree(str(path), tars=False), options) if path.is_dir() else list_table(path, options)
        if whole:
            _check_listing(listing, text)
        read = read_entries(listing, options)
        arrays, grouping = gather(read, listing.class_names, options, listing.by_folder)
        name = path.resolve().name if path.is_dir() else path.stem
        return arrays, name, text, Origin(dict(listing.ignored), grouping, _notes(listing))
    if path.is_file():
        return _read_npz(path), path.stem, text, Origin()
    close = difflib.get_close_matches(known, [*_PHANTOMS, *medmnist.MD5], n=3)
    raise InputError(
        f"source: {text!r} is no file, folder or known name"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
        + "; wanted an .npz, a folder of class folders, a table (.csv, .tsv, .parquet), phantom[:SIZE],"
        " phantom3d[:SIZE] or one of " + ", ".join(medmnist.CLASS_NAMES)
    )


def _check_listing(listing: Listing, where: str) -> None:
    """What a whole data set needs: two classes, and a train and a test split or none."""
    splits = {entry.split for entry in listing.entries}
    if splits != {""} and not {"train", "test"} <= splits:
        raise InputError(f"{where}: holds {', '.join(sorted(splits))}; wanted train and test (and val), or no splits")
    if len(listing.class_names) < 2:
        raise InputError(f"{where}: {len(listing.class_names)} class folders or labels; wanted 2 or more")


def _notes(listing: Listing) -> tuple[str, ...]:
    """What looks like patients but is not taken for them."""
    folders = {entry.folder for entry in listing.entries if entry.folder}
    inside: dict[str, set[str | None]] = {}
    for entry in listing.entries:
        inside.setdefault(str(entry.label), set()).add(entry.folder)
    same = next(iter(inside.values()))
    if len(same) > 1 and None not in same and all(found == same for found in inside.values()):
        names = ", ".join(sorted(str(folder).rpartition("/")[2] for folder in same)[:4])
        return (f"the same folders lie in all of the {len(inside)} class folders ({names}): are they the classes?",)
    told = any(entry.patient is not None for entry in listing.entries)
    if listing.by_folder or told or len(folders) < 2:
        return ()
    return (
        f"{len(folders)} folders inside class folders are not taken for patients; group='folder' (--group folder) "
        "keeps the images of each in one split",
    )


def _assemble(arrays: Arrays, name: str, where: str, train_size: int | None, seed: int, origin: Origin) -> DataSource:
    """Check the arrays of a MedMNIST-style file and make the splits."""
    held = set(arrays)
    splits = [s for s in SPLITS if s != "val" or {"val_images", "val_labels"} & held]
    if {"images", "labels"} & held and not {"train_images", "train_labels"} & held:
        splits = [""]
    keys = [(f"{s}_images".lstrip("_"), f"{s}_labels".lstrip("_")) for s in splits]
    grouped = any(key.endswith("groups") for key in held)
    if missing := [key for pair in keys for key in pair if key not in arrays]:
        raise InputError(f"{where}: holds {', '.join(arrays) or 'nothing'}; missing {', '.join(missing)}")
    images = [torch.from_numpy(channels_first(arrays[key], f"{where}: {key}")).contiguous() for key, _ in keys]
    if (brightest := max(int(x.max()) for x in images)) < _DIM:
        warnings.warn(
            f"no pixel is brighter than {brightest} of 255; window=(centre, width) (--window CENTRE WIDTH) says which "
            "values of image files are black and white",
            stacklevel=3,
        )
    if len({x.shape[1:] for x in images}) > 1:
        raise InputError(f"{where}: images of {[shape_of(x) for x in images]}; wanted one size in all splits")
    first = arrays[keys[0][1]]
    task = "multilabel" if first.ndim == 2 and first.shape[1] > 1 else "multiclass"
    base = check_labels(first, len(images[0]), task, name=f"{where}: {keys[0][1]}")
    count = base.shape[1] if task == "multilabel" else int(base.max()) + 1
    if task == "multilabel" and bool((base.sum(1) == 1).all()):
        note = f"every image has exactly one of the {count} labels: class numbers (labels.argmax(1)) make it multiclass"
        origin = replace(origin, notes=(*origin.notes, note))
    present = set(base.tolist()) if task == "multiclass" else set(range(count))
    if len(present) < count and "class_names" not in arrays:
        gap = next(number for number in range(count) if number not in present)
        raise InputError(f"{where}: class {gap} has no training image; number the classes from 0 without gaps")
    check_limit("CLASSES", count, f"{where}: {keys[0][1]}")
    names = find_class_names(arrays, name, count, where)
    if len(names) < 2:
        raise InputError(f"{where}: one class only; wanted 2 or more")
    folded = Counter(" ".join(name.casefold().split()) for name in names)
    if (alike := folded.most_common(1)[0])[1] > 1:
        note = f"classes that differ in case or spaces alone ({alike[0]!r}): are they one?"
        origin = replace(origin, notes=(*origin.notes, note))
    patients = [torch.from_numpy(arrays[key.replace("images", "groups")]) for key, _ in keys] if grouped else []
    check_apart(patients, where)
    own: list[torch.Tensor | None] = [*patients] or [None] * len(keys)
    parts = [
        LabelledImages(x, check_labels(arrays[key], len(x), task, len(names), name=f"{where}: {key}"), groups)
        for x, (_, key), groups in zip(images, keys, own, strict=True)
    ]
    if len(parts) < 3:  # val and, where missing, test are cut from train
        pieces = split(parts[0].labels, seed, 4 - len(parts), where, parts[0].groups)
        parts = [parts[0].subset(piece) for piece in pieces] + parts[1:]
    train, val, test = parts
    if train_size is None:
        return DataSource(name, task, names, train, train, val, test, torch.arange(len(train)), origin)
    least = len(names) if task == "multiclass" else 1
    if not least <= train_size <= len(train):
        raise InputError(f"train_size: {train_size}; wanted {least} (one per class) to {len(train)} (all)")
    chosen = stratified_order(train.labels, seed, train.groups)[:train_size].msort()
    return DataSource(name, task, names, train.subset(chosen), train, val, test, chosen, origin)


def find_class_names(arrays: Arrays, name: str, count: int, where: str) -> tuple[str, ...]:
    """Names of at least `count` classes: the file's own, MedMNIST's by the file's name, or numbers."""
    if "class_names" in arrays:
        given = arrays["class_names"]
        if given.dtype.kind != "U" or given.ndim != 1 or not count <= len(given) == len(set(given.tolist())):
            raise InputError(f"{where}: class_names {given.dtype} {list(given.shape)}; wanted {count} distinct strings")
        return tuple(given.tolist())
    known = medmnist.CLASS_NAMES.get(name.split("_")[0], ())
    return known if len(known) == count else tuple(str(i) for i in range(count))


def _read_npz(path: Path) -> Arrays:
    """The arrays of a MedMNIST-style file that we know the names of."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: damaged or no .npz file (tsynd never loads pickle)")
    keys = ["images", "labels", "class_names", *(f"{s}_{k}" for s in SPLITS for k in ("images", "labels"))]
    try:
        with np.load(path, allow_pickle=False) as archive:
            members = {info.filename: info for info in archive.zip.infolist()}
            held = canonical({name: name for name in archive.files}, str(path))
            for name in (held[key] for key in keys if key in held):
                if (info := members.get(f"{name}.npy")) is not None:
                    check_expansion(info.compress_size, info.file_size, f"{path}: {name}")
            arrays = {key: archive[held[key]] for key in keys if key in held}
            if odd := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise InputError(f"{path}: damaged .npz file ({odd[0]} is no array)")
            return arrays
    except InputError:
        raise
    except Exception as error:  # a damaged zip leads anywhere: encrypted, of an unknown compression, ...
        if "pickle" in str(error):
            raise InputError(f"{path}: holds Python objects; wanted plain arrays (tsynd never loads pickle)") from error
        raise InputError(f"{path}: damaged .npz file ({type(error).__name__}: {error})") from error
