"""Folders: class folders, or splits with class folders (or the other way round), and image files at any depth below."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from tsynd.data.filetree import FileTree
from tsynd.data.readers.image_file import START, kind_of
from tsynd.data.readers.listing import SPLITS, Entry, Listing, split_name
from tsynd.data.readers.options import ReadOptions
from tsynd.utils.errors import InputError

__all__ = ["image_files", "list_folder"]

_PATIENTS = 3  # folders that every class must have for them to be taken for patients


def list_folder(tree: FileTree, options: ReadOptions) -> Listing:
    """The image files below a folder; classes are numbered in the sorted order of their folders' names.

    With ``options.volumes`` the DICOM files of a folder inside a class folder are one volume.

    Raises:
        InputError: no class folders, an empty one, one that train has not, or folders that may be splits or classes.
    """
    if named := [n for n in ("path_column", "label_column", "split_column", "group_column") if options.named(n)]:
        raise InputError(f"{named[0]}: {getattr(options, named[0])!r}; wanted only with a table, not with a folder")
    ignored: Counter[str] = Counter()
    places, classes = _places(tree, ignored)
    held = {split for split, _, _ in places}
    base = next((split for split in SPLITS if split in held), "")
    entries: list[Entry] = []
    for split, label, folder in places:
        files = _image_files(tree, folder, ignored)
        if not files and split in ("", base):
            raise InputError(f"{tree.path(folder)}: no picture in this class folder, nor DICOM or NIfTI file")
        for names in _volumes(files, folder, options):
            inner = names[0][len(folder) + 1 :].rpartition("/")[0].partition("/")[0]
            entries.append(Entry(names, label, split, folder=f"{split}/{inner}" if inner else None))
    for split in sorted(held):
        if not any(entry.split == split for entry in entries):
            raise InputError(f"{tree.path(split)}: no pictures, nor DICOM or NIfTI files")
    return Listing(tree, entries, classes, ignored, _by_folder(entries, len(classes), options))


def _places(tree: FileTree, ignored: Counter[str]) -> tuple[list[tuple[str, int, str]], tuple[str, ...]]:
    """Split, class number and folder of every class folder, in order, and the classes' names."""
    folders = tree.folders()
    ignored.update(map(_suffix, tree.files()))
    splits = _splits(tree, folders)
    if not splits:
        if not folders:
            raise InputError(f"{tree.path('')}: 0 class folders; wanted 2 or more, with image files in them")
        places = []
        for label, name in enumerate(folders):
            inner = {folder: split_name(folder) for folder in tree.folders(name)}
            if not inner or None in inner.values() or len(set(inner.values())) < len(inner):
                break
            ignored.update(map(_suffix, tree.files(name)))
            places += [(str(split), label, f"{name}/{folder}") for folder, split in inner.items()]
        else:  # every class folder holds splits
            return sorted(places, key=lambda place: (SPLITS.index(place[0]), place[1])), tuple(folders)
        return [("", label, name) for label, name in enumerate(folders)], tuple(folders)
    for folder in sorted(set(folders) - set(splits.values())):
        ignored[f"folder {folder!r} beside the splits"] += 1
    base = next(split for split in SPLITS if split in splits)
    classes = tree.folders(splits[base])
    if not classes:
        raise InputError(f"{tree.path(splits[base])}: 0 class folders; wanted 2 or more, with image files in them")
    for folder in splits.values():
        ignored.update(map(_suffix, tree.files(folder)))
        if strange := set(tree.folders(folder)) - set(classes):
            raise InputError(f"{tree.path(folder)}: class folder {min(strange)!r} that {splits[base]} has not")
    return [
        (split, label, f"{splits[split]}/{name}")
        for split in SPLITS
        if split in splits
        for label, name in enumerate(classes)
    ], tuple(classes)


def _splits(tree: FileTree, folders: Sequence[str]) -> dict[str, str]:
    """The folder of every split; empty where the folders are classes."""
    named = {folder: split for folder in folders if (split := split_name(folder)) is not None}
    bare = [folder for folder in named if not tree.folders(folder)]
    if not named:
        words = {name: {s for word in re.split("[^a-zA-Z]+", name) if (s := split_name(word))} for name in folders}
        inner = {tuple(tree.folders(name)) for name, found in words.items() if found}
        if len(set().union(*words.values())) > 1 and len(inner) == 1 and len(next(iter(inner))) > 1:
            raise InputError(
                f"{tree.path('')}: {', '.join(map(repr, filter(words.get, folders)))} hold the same folders and sound "
                "like splits; wanted the names train, val and test, or, where they are classes, a table (.csv) with "
                "the columns path and label"
            )
    if not named or (bare and len(named) == 1 and len(folders) > 1 and not set(named) & set(SPLITS)):
        return {}  # such as the classes "valid" and "broken"
    if bare:
        raise InputError(
            f"{tree.path(bare[0])}: 0 class folders; a folder of this name is a split and holds class folders. Where "
            "it is a class, rename it or list the files in a table (.csv) with the columns path and label"
        )
    splits: dict[str, str] = {}
    for folder, split in named.items():
        if split in splits:
            raise InputError(f"{tree.path('')}: {splits[split]!r} and {folder!r} are both {split}; wanted one folder")
        splits[split] = folder
    return splits


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower() or "without suffix"


def image_files(tree: FileTree, folder: str, ignored: Counter[str], options: ReadOptions) -> list[tuple[str, ...]]:
    """The image files below a folder, one by one or, where volumes are wanted, the slices of a series together."""
    return _volumes(_image_files(tree, folder, ignored), folder, options)


def _image_files(tree: FileTree, folder: str, ignored: Counter[str]) -> list[tuple[str, str]]:
    """Names and kinds of the images below a folder."""
    found = []
    for name in sorted(tree.list(folder)):
        if any(part.startswith(".") for part in name.split("/")):
            continue
        full = f"{folder}/{name}" if folder else name
        regular = tree.is_regular(full)
        kind = kind_of(full, lambda full=full, go=regular: tree.start(full, START) if go else b"")  # type: ignore[misc]
        if kind is not None:
            found.append((full, kind))
        else:
            ignored[_suffix(name) if regular else "links to nothing, pipes or devices"] += 1
    return found


def _volumes(files: Sequence[tuple[str, str]], root: str, options: ReadOptions) -> list[tuple[str, ...]]:
    """The files one by one, but the slices of a folder inside ``root`` together where volumes are wanted."""
    series: dict[str, list[str]] = {}
    for name, kind in files:
        folder = name.rpartition("/")[0]
        together = options.volumes and kind == "dicom" and folder != root
        series.setdefault(f"{folder}/" if together else name, []).append(name)
    return [tuple(names) for names in series.values()]


def _by_folder(entries: Sequence[Entry], classes: int, options: ReadOptions) -> bool:
    """Whether the folders inside class folders are taken for patients."""
    if options.group != "auto":
        return options.group == "folder"
    inside: dict[int, set[str]] = {}
    for entry in entries:
        if entry.folder is not None and isinstance(entry.label, int):
            inside.setdefault(entry.label, set()).add(entry.folder)
    return len(inside) == classes and all(len(found) >= _PATIENTS for found in inside.values())
