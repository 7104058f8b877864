"""Labelled images in and out: MedMNIST-style files, folders of pictures, downloads and the phantom.

Also the library's checks of image and label arguments, and writing that never leaves half a file.
"""

from __future__ import annotations

import difflib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd import medmnist
from tsynd.checks import channels_first, check_labels, shape_of, unit_pixels
from tsynd.errors import InputError, require
from tsynd.phantom import phantom
from tsynd.phantom3d import phantom3d

__all__ = ["IMAGE_SUFFIXES", "DataSource", "LabelledImages", "find_class_names", "load_data"]

Arrays = dict[str, np.ndarray[Any, Any]]

_SPLITS = ("train", "val", "test")
_PHANTOMS = {"phantom": phantom, "phantom3d": phantom3d}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class LabelledImages(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images with their labels; a map-style `Dataset` kept in memory.

    Attributes:
        images: [N, C, H, W] or, for volumes, [N, C, D, H, W], uint8 or float in [0, 1].
        labels: int64 [N] (multiclass) or float32 [N, L] of 0 and 1 (multilabel).

    Raises:
        InputError: the shapes or the dtype are others than these.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        x = self.images
        if x.ndim not in (4, 5) or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise InputError(f"images: {shape_of(x)} {x.dtype}; wanted [N, C, H, W] or [N, C, D, H, W], uint8 or float")
        if len(x) != len(self.labels):
            raise InputError(f"labels: {len(self.labels)} for {len(x)} images; wanted one each")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image, float32 [C, H, W] or [C, D, H, W] in [0, 1], and its label."""
        return unit_pixels(self.images[index]), self.labels[index]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images at int64 `indices` [n] as float32 [n, C, ...] in [0, 1], and their labels."""
        return unit_pixels(self.images[indices]), self.labels[indices]

    def subset(self, indices: Tensor) -> LabelledImages:
        """A copy of the images and labels at int64 `indices` [n], in that order."""
        return LabelledImages(self.images[indices], self.labels[indices])

    def pixels(self) -> Tensor:
        """All images as float32 [N, C, ...] in [0, 1]."""
        return unit_pixels(self.images)


@dataclass(frozen=True, eq=False)
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
    """

    name: str
    task: str
    class_names: tuple[str, ...]
    train: LabelledImages
    unlabelled: LabelledImages
    val: LabelledImages
    test: LabelledImages
    train_indices: Tensor

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


def load_data(
    source: str | Path, *, train_size: int | None = None, seed: int = 0, image_size: int | None = None
) -> DataSource:
    """Load a data set.

    Args:
        source: one of
            - a MedMNIST-style .npz: `{train,val,test}_{images,labels}`, or `images` and `labels` alone; uint8
              images [N, H, W] or [N, H, W, 3], or volumes [N, D, H, W]; labels [N] or [N, 1], or [N, L] of 0 and 1
              (multilabel); optionally `class_names`, strings;
            - a folder of pictures: train/ val/ test/ with class folders, or class folders alone; classes are
              numbered in the sorted order of their names;
            - a MedMNIST set, as `pneumoniamnist`, `bloodmnist_64` or `nodulemnist3d`: downloaded once, into the folder
              that the variable TSYND_DATA names or the user's cache;
            - `phantom` or `phantom:SIZE`, pictures of cells; `phantom3d` or `phantom3d:SIZE`, volumes of nodules.

            Without a val split 15 % of train becomes it; without any split the shares are 70/15/15.
        train_size: how many labelled training images to draw, with the class shares kept and at least one of
            every class; a smaller draw of the same seed is contained in a larger one. None: all.
        seed: seeds that draw and any splitting, never the images themselves.
        image_size: for folders: resize every picture to this square.

    Raises:
        InputError: the source or an argument cannot be used.
        MissingExtraError: pillow (folders) or pooch (downloads) is not installed.
    """
    if seed < 0:
        raise InputError(f"seed: {seed}; wanted 0 or more")
    text = str(source)
    known, path = text.lower(), Path(source).expanduser()
    kind, _, size = known.partition(":")
    is_name = isinstance(source, str)
    if image_size is not None and (image_size < 1 or not path.is_dir()):
        raise InputError(f"image_size: {image_size}; wanted 1 or more, and only with a folder of pictures")
    if is_name and kind in _PHANTOMS:
        if size and not size.isdecimal():
            raise InputError(f"source: {text!r}; wanted '{kind}' or '{kind}:SIZE', such as '{kind}:64'")
        return _assemble(_PHANTOMS[kind](int(size or 28)), text, text, train_size, seed)
    if is_name and known in medmnist.MD5:
        path = medmnist.download(known)
        return _assemble(_read_npz(path), known, str(path), train_size, seed)
    if path.is_dir():
        return _assemble(_read_folder(path, image_size), path.resolve().name, text, train_size, seed)
    if path.is_file():
        return _assemble(_read_npz(path), path.stem, text, train_size, seed)
    close = difflib.get_close_matches(known, [*_PHANTOMS, *medmnist.MD5], n=3)
    raise InputError(
        f"source: {text!r} is no file, folder or known name"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
        + "; wanted an .npz, a folder of class folders, phantom[:SIZE], phantom3d[:SIZE] or one of "
        + ", ".join(medmnist.CLASS_NAMES)
    )


def _assemble(arrays: Arrays, name: str, where: str, train_size: int | None, seed: int) -> DataSource:
    """Check the arrays of a MedMNIST-style file and make the splits."""
    held = set(arrays)
    groups = [s for s in _SPLITS if s != "val" or {"val_images", "val_labels"} & held]
    if {"images", "labels"} & held and not {"train_images", "train_labels"} & held:
        groups = [""]
    keys = [(f"{g}_images".lstrip("_"), f"{g}_labels".lstrip("_")) for g in groups]
    if missing := [key for pair in keys for key in pair if key not in arrays]:
        raise InputError(f"{where}: holds {', '.join(arrays) or 'nothing'}; missing {', '.join(missing)}")
    images = [torch.from_numpy(channels_first(arrays[key], f"{where}: {key}")).contiguous() for key, _ in keys]
    if len({x.shape[1:] for x in images}) > 1:
        raise InputError(f"{where}: images of {[shape_of(x) for x in images]}; wanted one size in all splits")
    first = arrays[keys[0][1]]
    task = "multilabel" if first.ndim == 2 and first.shape[1] > 1 else "multiclass"
    base = check_labels(first, len(images[0]), task, name=f"{where}: {keys[0][1]}")
    count = base.shape[1] if task == "multilabel" else int(base.max()) + 1
    present = set(base.tolist()) if task == "multiclass" else set(range(count))
    if len(present) < count and "class_names" not in arrays:
        gap = next(number for number in range(count) if number not in present)
        raise InputError(f"{where}: class {gap} has no training image; number the classes from 0 without gaps")
    names = find_class_names(arrays, name, count, where)
    if len(names) < 2:
        raise InputError(f"{where}: one class only; wanted 2 or more")
    parts = [
        LabelledImages(x, check_labels(arrays[key], len(x), task, len(names), name=f"{where}: {key}"))
        for x, (_, key) in zip(images, keys, strict=True)
    ]
    if len(parts) < 3:  # the ends of a stratified order become val and, where missing, test
        order, cuts = _order(parts[0].labels, seed), 3 - len(parts)
        share = max(1, round(0.15 * len(order)))
        rest = len(order) - share * cuts
        if rest < (len(present) if task == "multiclass" else 1):
            raise InputError(f"{where}: {len(order)} images are too few to split off val{' and test' * (cuts - 1)}")
        pieces = [order[:rest], *order[rest:].reshape(cuts, share)]
        parts = [parts[0].subset(p.msort()) for p in pieces] + parts[1:]
    train, val, test = parts
    if train_size is None:
        return DataSource(name, task, names, train, train, val, test, torch.arange(len(train)))
    least = len(names) if task == "multiclass" else 1
    if not least <= train_size <= len(train):
        raise InputError(f"train_size: {train_size}; wanted {least} (one per class) to {len(train)} (all)")
    chosen = _order(train.labels, seed)[:train_size].msort()
    return DataSource(name, task, names, train.subset(chosen), train, val, test, chosen)


def _order(labels: Tensor, seed: int) -> Tensor:
    """A seeded order whose every beginning keeps the class shares (multilabel: any order); int64 [N]."""
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    if labels.ndim == 1:
        # Sainte-Laguë: the j-th of a class of n has turn (j + 1/2) / n; the first of every class goes first.
        classes, turn = labels.numpy()[shuffled], np.empty(len(labels))
        for c in np.unique(classes):
            members = np.flatnonzero(classes == c)
            turn[members] = (np.arange(len(members)) + 0.5) / len(members)
            turn[members[0]] = -1
        shuffled = shuffled[np.argsort(turn, kind="stable")]
    return torch.from_numpy(shuffled)


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
    keys = ["images", "labels", "class_names", *(f"{s}_{k}" for s in _SPLITS for k in ("images", "labels"))]
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in keys if key in archive.files}
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if "pickle" in str(error):
            raise InputError(f"{path}: holds Python objects; wanted plain arrays (tsynd never loads pickle)") from error
        raise InputError(f"{path}: damaged .npz file ({error})") from error


def _read_folder(path: Path, image_size: int | None) -> Arrays:
    """The pictures below a folder as the arrays of a MedMNIST-style file."""
    folders = _subfolders(path)
    roots = {f"{s}_": path / s for s in _SPLITS if s in folders}
    if roots and not {"train", "test"} <= set(folders):
        raise InputError(f"{path}: holds {', '.join(folders)}; wanted train and test (and val), or class folders alone")
    classes = _subfolders(path / "train") if roots else folders
    if len(classes) < 2:
        raise InputError(f"{path}: {len(classes)} class folders; wanted 2 or more with pictures in them")
    arrays: Arrays = {"class_names": np.array(classes)}
    first: tuple[Path, tuple[int, ...]] | None = None
    for prefix, root in (roots or {"": path}).items():
        if strange := set(_subfolders(root)) - set(classes):
            raise InputError(f"{root}: class folder {min(strange)!r} that train has not")
        images, labels = [], []
        for number, name in enumerate(classes):
            files = sorted(f for f in (root / name).glob("*") if _is_picture(f))
            if not files and prefix in ("", "train_"):
                raise InputError(
                    f"{root / name}: no picture in this class folder ({', '.join(sorted(IMAGE_SUFFIXES))})"
                )
            for file in files:
                image = _read_picture(file, image_size)
                first = first or (file, image.shape)
                if image.shape != first[1]:
                    raise InputError(
                        f"{file}: {_picture(image.shape)}, while {first[0].name} is {_picture(first[1])}; "
                        "wanted one size and one colour mode (image_size=N resizes)"
                    )
                images.append(image)
                labels.append(number)
        if not images:
            raise InputError(f"{root}: no pictures")
        arrays[f"{prefix}images"], arrays[f"{prefix}labels"] = np.stack(images), np.array(labels)
    return arrays


def _subfolders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_picture(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")


def _picture(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} {'RGB' if len(shape) == 3 else 'grey'}"


def _read_picture(file: Path, image_size: int | None) -> np.ndarray[Any, Any]:
    """One picture as uint8 [H, W] or [H, W, 3]; transparency is dropped."""
    pillow = require("PIL.Image", "data")
    try:
        with pillow.open(file) as image:
            if image.mode[0] in "IF" or getattr(image, "n_frames", 1) > 1:
                raise InputError(f"{file}: mode {image.mode}, not one 8-bit picture; convert it to 8 bits first")
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            if image_size is not None:  # Pillow's filters antialias
                image = image.resize((image_size, image_size), pillow.Resampling.BILINEAR)
            return np.asarray(image)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise InputError(f"{file}: unreadable picture ({error})") from error
