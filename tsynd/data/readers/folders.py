"""Folders: class folders, or train/, val/, test/ with class folders, and image files at any depth below."""

from __future__ import annotations

from collections.abc import Sequence

from tsynd.data.filetree import FileTree
from tsynd.data.readers.image_file import START, kind_of
from tsynd.data.readers.listing import SPLITS, Entry, Listing
from tsynd.data.readers.options import ReadOptions
from tsynd.utils.errors import InputError

__all__ = ["list_folder"]


def list_folder(tree: FileTree, options: ReadOptions) -> Listing:
    """The image files below a folder; classes are numbered in the sorted order of their folders' names.

    With ``options.volumes`` the DICOM files of a folder inside a class folder are one volume.

    Raises:
        InputError: no class folders, an empty one, or one that train has not.
    """
    if named := [n for n in ("path_column", "label_column", "split_column", "group_column") if options.named(n)]:
        raise InputError(f"{named[0]}: {getattr(options, named[0])!r}; wanted only with a table, not with a folder")
    folders = tree.folders()
    splits = [split for split in SPLITS if split in folders] or [""]
    base = "train" if "train" in splits else splits[0]
    classes = tree.folders(base) if base else folders
    if not classes:
        raise InputError(f"{tree.path(base)}: 0 class folders; wanted 2 or more, with image files in them")
    entries: list[Entry] = []
    for split in splits:
        root = f"{split}/" if split else ""
        if strange := set(tree.folders(split) if split else folders) - set(classes):
            raise InputError(f"{tree.path(split)}: class folder {min(strange)!r} that {base or 'it'} has not")
        for label, name in enumerate(classes):
            files = _image_files(tree, root + name)
            if not files and split in ("", base):
                raise InputError(f"{tree.path(root + name)}: no picture in this class folder, nor DICOM or NIfTI file")
            entries += [Entry(names, label, split) for names in _volumes(files, root + name, options)]
        if not any(entry.split == split for entry in entries):
            raise InputError(f"{tree.path(split)}: no pictures, nor DICOM or NIfTI files")
    return Listing(tree, entries, tuple(classes))


def _image_files(tree: FileTree, folder: str) -> list[tuple[str, str]]:
    """Names and kinds of the images below a folder."""
    found = []
    for name in sorted(tree.list(folder)):
        if any(part.startswith(".") for part in name.split("/")):
            continue
        full = f"{folder}/{name}"
        if (kind := kind_of(full, lambda full=full: tree.start(full, START))) is not None:  # type: ignore[misc]
            found.append((full, kind))
    return found


def _volumes(files: Sequence[tuple[str, str]], root: str, options: ReadOptions) -> list[tuple[str, ...]]:
    """The files one by one, but the slices of a folder inside ``root`` together where volumes are wanted."""
    series: dict[str, list[str]] = {}
    for name, kind in files:
        folder = name.rpartition("/")[0]
        together = options.volumes and kind == "dicom" and folder != root
        series.setdefault(f"{folder}/" if together else name, []).append(name)
    return [tuple(names) for names in series.values()]
