"""Images without labels: one file, or every image file below a folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tsynd.data.filetree import FileTree
from tsynd.data.readers.folders import image_files
from tsynd.data.readers.image_file import START, kind_of
from tsynd.data.readers.listing import Entry, read_entry
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.pixels import Array, describe
from tsynd.utils.errors import InputError

__all__ = ["read_unlabelled"]


def read_unlabelled(source: str | Path, options: ReadOptions) -> tuple[list[str], Tensor, Counter[str]]:
    """Read pictures, DICOM and NIfTI files in the order of their names.

    Args:
        source: a file, or a folder with files at any depth.
        options: how they are read.

    Returns:
        the files' names (below the folder; of one that gives several images with ``:0``, ``:1``, ...), the images
        uint8 [N, C, H, W] or [N, C, D, H, W], and how many files of which suffix are no images.

    Raises:
        InputError: nothing there is an image, one cannot be read, or their sizes differ.
        MissingExtraError: a package is not installed.
    """
    path = Path(source).expanduser()
    ignored: Counter[str] = Counter()
    if path.is_dir():
        tree = FileTree(str(path), tars=False)
        files = image_files(tree, "", ignored, options)
        if not files:
            raise InputError(f"data: {path} holds no picture, DICOM or NIfTI file")
    elif path.is_file():
        tree = FileTree(str(path.parent), tars=False)
        if kind_of(path.name, lambda: tree.start(path.name, START)) is None:
            raise InputError(f"data: {path} is no picture, DICOM or NIfTI file")
        files = [(path.name,)]
    else:
        raise InputError(f"data: {path} is no file or folder")
    names: list[str] = []
    images: list[Array] = []
    for entry in files:
        found, _ = read_entry(tree, Entry(entry, 0), options)
        name = entry[0] if len(entry) == 1 else entry[0].rpartition("/")[0]
        names += [name] if len(found) == 1 else [f"{name}:{number}" for number in range(len(found))]
        for image in found:
            if images and image.shape != images[0].shape:
                raise InputError(
                    f"data: {names[0]} is {describe(images[0].shape)}, {name} is {describe(image.shape)}; wanted one "
                    "size and colour mode (image_size=..., channels=...)"
                )
            images.append(image)
    return names, torch.from_numpy(np.stack(images)), ignored
