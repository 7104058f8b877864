"""Labelled images in and out: MedMNIST-style files, folders of pictures, downloads and the phantom.

Also the library's checks of image and label arguments, and writing that never leaves half a file.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.errors import InputError, require
from tsynd.phantom import phantom

__all__ = [
    "DataSource",
    "LabelledImages",
    "atomic_path",
    "check_images",
    "check_labels",
    "load_data",
    "save_class_folders",
    "save_npz",
    "to_uint8",
]

Arrays = dict[str, np.ndarray[Any, Any]]

# Name, md5 of the files at 28, 64, 128 and 224 pixels, class names: the INFO table of medmnist 3.0.2.
_MEDMNIST_URL = "https://zenodo.org/records/10519652/files/{}.npz?download=1"
_MEDMNIST_TABLE = """
pathmnist a8b06965200029087d5bd730944a56c1 55aa9c1e0525abe5a6b9d8343a507616
    ac42d08fb904d92c244187169d1fd1d9 2c51a510bcdc9cf8ddb2af93af1eadec
    adipose| background| debris| lymphocytes| mucus| smooth muscle| normal colon mucosa| cancer-associated
    stroma| colorectal adenocarcinoma epithelium;
chestmnist 02c8a6516a18b556561a56cbdd36c4a8 9de6cd0b934ebb5b7426cfba5efbae16
    db107e5590b27930b62dbaf558aebee3 45bd33e6f06c3e8cdb481c74a89152aa
    atelectasis| cardiomegaly| effusion| infiltration| mass| nodule| pneumonia| pneumothorax| consolidation|
    edema| emphysema| fibrosis| pleural| hernia;
dermamnist 0744692d530f8e62ec473284d019b0c7 b70a2f5635c6199aeaa28c31d7202e1f
    2defd784463fa5243564e855ed717de1 8974907d8e169bef5f5b96bc506ae45d
    actinic keratoses and intraepithelial carcinoma| basal cell carcinoma| benign keratosis-like lesions|
    dermatofibroma| melanoma| melanocytic nevi| vascular lesions;
octmnist c68d92d5b585d8d81f7112f81e2d0842 e229e9440236b774d9f0dfef9d07bdaf
    0a97e76651ace45c5d943ee3f65b63ae abc493b6d529d5de7569faaef2773ba3
    choroidal neovascularization|diabetic macular edema|drusen|normal;
pneumoniamnist 28209eda62fecd6e6a2d98b1501bb15f 8f4eceb4ccffa70c672198ea285246c6
    05b46931834c231683c68f40c47b2971 d6a3c71de1b945ea11211b03746c1fe1
    normal|pneumonia;
retinamnist bd4c0672f1bba3e3a89f0e4e876791e4 afda852cc34dcda56f86ad2b2457dbcc
    e48e916a24454daf90583d4e6efb1a18 eae7e3b6f3fcbda4ae613ebdcbe35348
    0|1|2|3|4;
breastmnist 750601b1f35ba3300ea97c75c52ff8f6 742edef2a1fd1524b2efff4bd7ba9364
    363e4b3f8d712e9b5de15470a2aaadf1 b56378a6eefa9fed602bb16d192d4c8b
    malignant|normal, benign;
bloodmnist 7053d0359d879ad8a5505303e11de1dc 2b94928a2ae4916078ca51e05b6b800b
    adace1e0ed228fccda1f39692059dd4c b718ff6835fcbdb22ba9eacccd7b2601
    basophil| eosinophil| erythroblast| immature granulocytes(myelocytes, metamyelocytes and promyelocytes)|
    lymphocyte| monocyte| neutrophil| platelet;
tissuemnist ebe78ee8b05294063de985d821c1c34b 123ece2eba09d0aa5d698fda57103344
    61b955355d7425a89687b06cca3ce0c2 b077128c4a949f0a4eb01517f9037b9c
    Collecting Duct, Connecting Tubule| Distal Convoluted Tubule| Glomerular endothelial cells| Interstitial
    endothelial cells| Leukocytes| Podocytes| Proximal Tubule Segments| Thick Ascending Limb;
organamnist 68e3f8846a6bd62f0c9bf841c0d9eacc 2dcccc29b88e6da5a01161ef20cda288
    eeae80d0a227a8d099027e1b3cfd3b60 50747347e05c87dd3aaf92c49f9f3170
    bladder|femur-left|femur-right|heart|kidney-left|kidney-right|liver|lung-left|lung-right|pancreas|spleen;
organcmnist b9ceb9546e10131b32923c5bbeaea2b1 3ce34a8724ea6f548e6db4744d03b6a9
    773c1f009daa3fe5d9a2a201b2a7ed94 050f5e875dc056f6768abf94ec9995d1
    bladder|femur-left|femur-right|heart|kidney-left|kidney-right|liver|lung-left|lung-right|pancreas|spleen;
organsmnist 9ab87b696fb54e2a387ebe992d6ed5f1 53a6d115339d874c25e309a994ff46d3
    ded0c5fa01a95dc4978b956f613e9b8e b354719e553fbbb2513d5533f52a4cb1
    bladder|femur-left|femur-right|heart|kidney-left|kidney-right|liver|lung-left|lung-right|pancreas|spleen
"""
_MD5: dict[str, str] = {}
_CLASS_NAMES: dict[str, tuple[str, ...]] = {}
for _entry in _MEDMNIST_TABLE.split(";"):
    _name, *_sums, _classes = _entry.split(maxsplit=5)
    _MD5.update(zip([_name, f"{_name}_64", f"{_name}_128", f"{_name}_224"], _sums, strict=True))
    _CLASS_NAMES[_name] = tuple(re.split(r"\|\s*", " ".join(_classes.split())))

_SPLITS = ("train", "val", "test")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class LabelledImages(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images with their labels; a map-style `Dataset` kept in memory.

    Attributes:
        images: [N, C, H, W], uint8 or float in [0, 1].
        labels: int64 [N] (multiclass) or float32 [N, L] of 0 and 1 (multilabel).

    Raises:
        InputError: the shapes or the dtype are others than these.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        x = self.images
        if x.ndim != 4 or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise InputError(f"images: {_shape(x)} {x.dtype}; wanted [N, C, H, W], uint8 or float")
        if len(x) != len(self.labels):
            raise InputError(f"labels: {len(self.labels)} for {len(x)} images; wanted one each")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image, float32 [C, H, W] in [0, 1], and its label."""
        return _unit(self.images[index]), self.labels[index]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images at int64 `indices` [n] as float32 [n, C, H, W] in [0, 1], and their labels."""
        return _unit(self.images[indices]), self.labels[indices]

    def subset(self, indices: Tensor) -> LabelledImages:
        """A copy of the images and labels at int64 `indices` [n], in that order."""
        return LabelledImages(self.images[indices], self.labels[indices])

    def pixels(self) -> Tensor:
        """All images as float32 [N, C, H, W] in [0, 1]."""
        return _unit(self.images)


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
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

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
              images [N, H, W] or [N, H, W, 3]; labels [N] or [N, 1], or [N, L] of 0 and 1 (multilabel);
              optionally `class_names`, strings;
            - a folder of pictures: train/ val/ test/ with class folders, or class folders alone; classes are
              numbered in the sorted order of their names;
            - a 2-D MedMNIST set, as `pneumoniamnist` or `bloodmnist_64`: downloaded once, into the folder
              that the variable TSYND_DATA names or the user's cache;
            - `phantom` or `phantom:SIZE`.

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
    if is_name and kind == "phantom":
        if size and not size.isdecimal():
            raise InputError(f"source: {text!r}; wanted 'phantom' or 'phantom:SIZE', such as 'phantom:64'")
        return _assemble(phantom(int(size or 28)), text, text, train_size, seed)
    if is_name and known in _MD5:
        path = _download(known)
        return _assemble(_read_npz(path), known, str(path), train_size, seed)
    if path.is_dir():
        return _assemble(_read_folder(path, image_size), path.resolve().name, text, train_size, seed)
    if path.is_file():
        return _assemble(_read_npz(path), path.stem, text, train_size, seed)
    close = difflib.get_close_matches(known, ["phantom", *_MD5], n=3)
    raise InputError(
        f"source: {text!r} is no file, folder or known name"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
        + f"; wanted an .npz, a folder of class folders, phantom[:SIZE] or one of {', '.join(_CLASS_NAMES)}"
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
    images = [_channels_first(arrays[key], f"{where}: {key}") for key, _ in keys]
    if len({x.shape[1:] for x in images}) > 1:
        raise InputError(f"{where}: images of {[_shape(x) for x in images]}; wanted one size in all splits")
    first = arrays[keys[0][1]]
    task = "multilabel" if first.ndim == 2 and first.shape[1] > 1 else "multiclass"
    base = check_labels(first, len(images[0]), task, name=f"{where}: {keys[0][1]}")
    count = base.shape[1] if task == "multilabel" else int(base.max()) + 1
    present = set(base.tolist()) if task == "multiclass" else set(range(count))
    if len(present) < count and "class_names" not in arrays:
        gap = next(number for number in range(count) if number not in present)
        raise InputError(f"{where}: class {gap} has no training image; number the classes from 0 without gaps")
    names = _class_names(arrays, name, count, where)
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


def _class_names(arrays: Arrays, name: str, count: int, where: str) -> tuple[str, ...]:
    """Names of at least `count` classes: the file's own, MedMNIST's by the file's name, or numbers."""
    if "class_names" in arrays:
        given = arrays["class_names"]
        if given.dtype.kind != "U" or given.ndim != 1 or not count <= len(given) == len(set(given.tolist())):
            raise InputError(f"{where}: class_names {given.dtype} {list(given.shape)}; wanted {count} distinct strings")
        return tuple(given.tolist())
    known = _CLASS_NAMES.get(name.split("_")[0], ())
    return known if len(known) == count else tuple(str(i) for i in range(count))


def _channels_first(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """Uint8 [N, H, W] or [N, H, W, 1 or 3] as a tensor [N, C, H, W]."""
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or array.size == 0:
        raise InputError(f"{where}: {array.dtype} {list(array.shape)}; wanted uint8 [N, H, W] or [N, H, W, 3], N > 0")
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


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
                    f"{root / name}: no picture in this class folder ({', '.join(sorted(_IMAGE_SUFFIXES))})"
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
    return file.is_file() and file.suffix.lower() in _IMAGE_SUFFIXES and not file.name.startswith(".")


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


def _download(name: str) -> Path:
    """The file of a MedMNIST set, downloaded and md5-checked unless it is there already."""
    pooch = require("pooch", "data")
    folder = Path(os.environ.get("TSYND_DATA") or pooch.os_cache("tsynd")).expanduser()
    path, url = folder / f"{name}.npz", _MEDMNIST_URL.format(name)
    if path.exists():
        found = pooch.file_hash(str(path), alg="md5")
        if found != _MD5[name]:
            raise InputError(
                f"{path}: md5 {found}, wanted {_MD5[name]}; remove it, or pass its path to use it as it is"
            )
        return path
    try:
        pooch.retrieve(url, known_hash=f"md5:{_MD5[name]}", fname=path.name, path=folder)
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: download failed ({reason}); fetch {url} by hand and put it at {path}") from error
    except ValueError as error:
        raise InputError(f"{name}: what {url} gave has not the md5 {_MD5[name]}; nothing was kept") from error
    return path


def check_images(images: object, *, name: str = "images") -> Tensor:
    """Turn an image argument into a tensor the library works on.

    Args:
        images: tensor or array [N, C, H, W], N > 0: uint8, or float in [0, 1] (to 1e-4, then clamped).
        name: the argument's name, for messages.

    Returns:
        float32 [N, C, H, W] in [0, 1] on the same device; may share memory with `images`.

    Raises:
        InputError: wrong type, dtype, shape or range, or a pixel that is not finite.
    """
    x = _tensor(images, name)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise InputError(f"{name}: dtype {x.dtype}; wanted uint8, or float in [0, 1]")
    if x.ndim != 4 or x.numel() == 0:
        hint = "; add the channel or batch axis with unsqueeze" if x.ndim in (2, 3) else ""
        raise InputError(f"{name}: shape {_shape(x)}; wanted [N, C, H, W] with N > 0{hint}")
    if x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise InputError(f"{name}: shape {_shape(x)} looks channels-last; wanted [N, C, H, W]")
    if x.dtype == torch.uint8:
        return _unit(x)
    x = x.float()
    low, high = (v.item() for v in x.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise InputError(f"{name}: a pixel of image {bad} is not finite; wanted values in [0, 1]")
    if low < -1e-4 or high > 1 + 1e-4:
        raise InputError(f"{name}: values from {low:g} to {high:g}; wanted [0, 1] (or uint8)")
    return x.clamp(0, 1) if low < 0 or high > 1 else x


def check_labels(
    labels: object, count: int, task: str, num_classes: int | None = None, *, name: str = "labels"
) -> Tensor:
    """Turn a label argument into a tensor the library works on.

    Args:
        labels: multiclass: integers [count] or [count, 1]; multilabel: 0 and 1 [count, L], any dtype.
        count: number of images.
        task: "multiclass" or "multilabel".
        num_classes: number of classes, or L; None: not checked.
        name: the argument's name, for messages.

    Returns:
        int64 [count] (multiclass) or float32 [count, L] (multilabel), on the same device.

    Raises:
        InputError: wrong type, dtype, shape or range, or an unknown task.
    """
    if task not in ("multiclass", "multilabel"):
        raise InputError(f"task: {task!r}; wanted 'multiclass' or 'multilabel'")
    y = _tensor(labels, name)
    multiclass = task == "multiclass"
    if multiclass and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != (1 if multiclass else 2) or len(y) != count or count == 0:
        wanted = f"[{count}]" if multiclass else f"[{count}, L]"
        raise InputError(f"{name}: shape {_shape(y)}; wanted {wanted} for {count} images ({task}), at least one")
    if not multiclass:
        if bool(((y != 0) & (y != 1)).any()):
            raise InputError(f"{name}: values other than 0 and 1; wanted only these ({task})")
        if num_classes not in (None, y.shape[1]):
            raise InputError(f"{name}: {y.shape[1]} labels per image; wanted {num_classes}")
        return y.float()
    if y.is_floating_point() or y.is_complex():
        raise InputError(f"{name}: dtype {y.dtype}; wanted integers (class numbers)")
    y = y.long()
    low, high = int(y.min()), int(y.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        top = "" if num_classes is None else f" to {num_classes - 1}"
        raise InputError(f"{name}: values from {low} to {high}; wanted 0{top or ' or more'}")
    return y


def to_uint8(images: object) -> np.ndarray[Any, Any]:
    """Images (as for `check_images`, 1 or 3 channels) as uint8 [N, H, W] or [N, H, W, 3], MedMNIST's layout.

    Raises:
        InputError: as `check_images`, or another number of channels.
    """
    x = check_images(images)
    if x.shape[1] not in (1, 3):
        raise InputError(f"images: {x.shape[1]} channels; wanted 1 (grey) or 3 (RGB)")
    out: np.ndarray[Any, Any] = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return np.ascontiguousarray(out[..., 0] if out.shape[3] == 1 else out)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file or folder at; renamed on success, else deleted.

    Missing parent folders are made. The temporary name keeps the suffix and starts with a dot.

    Raises:
        InputError: the folder cannot be written to, or `path` cannot be replaced.
    """
    path = Path(path).expanduser()
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # fails here rather than after the work
        temporary.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot write in its folder ({error.strerror})") from error
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"{path}: cannot be replaced ({error.strerror})") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def save_npz(path: str | Path, /, **arrays: object) -> None:
    """Write tensors, arrays or sequences as a compressed .npz, whole or not at all.

    Raises:
        InputError: an array would need pickle, or the folder cannot be written to.
    """
    plain = {k: v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in arrays.items()}
    if bad := [key for key, array in plain.items() if array.dtype.hasobject]:
        raise InputError(f"{bad[0]}: an array of Python objects; wanted numbers or strings")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **plain)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


def save_class_folders(path: str | Path, images: object, labels: object, class_names: Sequence[str]) -> None:
    """Write one PNG per image, `CLASS/000123.png` with its position, as a folder that `load_data` reads.

    Folders bear the class names (odd characters replaced); where these do not sort in class order, the class
    number goes before them, so that `load_data` numbers the classes alike. Classes without an image get none.

    Args:
        path: folder to make; must not exist or be empty.
        images: as for `check_images`, 1 or 3 channels.
        labels: integers [N] (multiclass).
        class_names: the name of every class.

    Raises:
        InputError: bad images or labels, multilabel ones included, or `path` holds something.
        MissingExtraError: pillow is not installed.
    """
    pillow = require("PIL.Image", "data")
    pixels = to_uint8(images)
    y = _tensor(labels, "labels")
    if y.ndim == 2 and y.shape[1] > 1:
        raise InputError(f"labels: {_shape(y)} is multilabel; class folders hold one class per image, use save_npz")
    y = check_labels(y, len(pixels), "multiclass", len(class_names))
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"path: {path} exists and is not an empty folder; wanted a new one")
    folders = [re.sub(r"[^\w.,() +-]|^\.", "_", name) or "_" for name in class_names]
    if folders != sorted(set(folders)):
        digits = len(str(len(folders)))
        folders = [f"{number:0{digits}d}_{name}" for number, name in enumerate(folders)]
    with atomic_path(path) as temporary:
        for index, (image, label) in enumerate(zip(pixels, y.tolist(), strict=True)):
            folder = temporary / folders[label]
            folder.mkdir(parents=True, exist_ok=True)
            pillow.fromarray(image).save(folder / f"{index:06d}.png")


def _tensor(values: object, name: str) -> Tensor:
    """A tensor of numbers, sharing memory where it can."""
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "buif":
            raise TypeError(f"dtype {array.dtype}")
        if array.dtype.kind in "iu" and array.dtype != np.uint8:
            array = array.astype(np.int64)
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {type(values).__name__} ({error}); wanted a tensor or array of numbers") from error


def _unit(x: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
