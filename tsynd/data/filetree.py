"""Files of a data source, on this machine or behind an fsspec address, read by position.

``identity`` hashes are over every file's name, size and bytes; beyond ``HASHED_WHOLE`` bytes in all, over each file's
first and last mebibyte. Compressed .npz arrays cannot be mapped: they are unpacked once, to the folder that the
variable TSYND_CACHE names or ``~/.cache/tsynd``.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError, require
from tsynd.utils.fingerprint import _BLOCK

__all__ = ["HASHED_WHOLE", "FileTree", "Record", "index_tar", "map_member"]

HASHED_WHOLE = 4 * 2**30
_OPEN = 64  # files kept open at once
_IMAGES = (".png", ".jpg", ".jpeg", ".npy")


def _expand(text: str) -> list[str]:
    """``{000..099}`` written out."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if found is None:
        return [text]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [one for n in numbers for one in _expand(f"{text[: found.start()]}{n:0{len(first)}d}{text[found.end() :]}")]


class FileTree:
    """What an address names: one file, a folder, or several tars.

    Args:
        text: a path, an fsspec address, or a pattern of tars.
        tars: take a folder that holds tars for these.

    Attributes:
        remote: behind fsspec.
        is_file, is_folder: what it is; neither where nothing is there.
        tars: names of the tars, if that is what the address means.
    """

    def __init__(self, text: str, tars: bool = True) -> None:
        self.text = text
        self.remote = "://" in text or "::" in text
        self._fs: Any = None
        root = text if self.remote else os.path.expanduser(text)
        if self.remote:
            try:
                self._fs, root = require("fsspec", "big").core.url_to_fs(text)
            except (ValueError, ImportError) as error:
                raise InputError(f"source: {text!r} is an address that fsspec cannot use: {error}") from None
        self._root = root
        self._open: OrderedDict[str, Any] = OrderedDict()
        pattern = root.endswith(".tar") and ("*" in root or "{" in root)
        self.is_file = not pattern and (self._fs.isfile(root) if self.remote else os.path.isfile(root))
        self.is_folder = not pattern and (self._fs.isdir(root) if self.remote else os.path.isdir(root))
        self.tars: list[str] = []
        if pattern:
            match = self._fs.glob if self.remote else glob.glob
            self.tars = sorted(name for one in _expand(root) for name in (match(one) if "*" in one else [one]))
            if not self.tars:
                raise InputError(f"source: {text!r} matches no file")
            self._root = ""
        elif self.is_file and root.endswith(".tar"):
            self.tars, self._root = [root], ""
        elif self.is_folder and tars:
            inside = (
                self._fs.glob(f"{root}/*.tar") if self.remote else glob.glob(os.path.join(glob.escape(root), "*.tar"))
            )
            if inside:
                self.tars, self._root = sorted(inside), ""

    @property
    def name(self) -> str:
        """Last part of the address."""
        return os.path.basename(self._root)

    def path(self, name: str) -> str:
        """Where a file is: ``name`` below the address, unless it says the whole way itself."""
        if not self.remote and os.path.isabs(name):
            return name
        return f"{self._root.rstrip('/')}/{name}" if name and self._root else name or self._root

    def local(self) -> Path | None:
        """The file's path, None behind fsspec."""
        return None if self.remote else Path(self._root)

    def open(self, name: str = "") -> BinaryIO:
        """Open a file, to read; the caller closes it."""
        path = self.path(name)
        try:
            return cast("BinaryIO", self._fs.open(path, "rb") if self.remote else open(path, "rb"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None

    def folders(self, name: str = "") -> list[str]:
        """Names of the folders in a folder, sorted, without hidden ones."""
        root = self.path(name).rstrip("/")
        if self.remote:
            found = [
                os.path.basename(item["name"].rstrip("/"))
                for item in self._fs.ls(root, detail=True)
                if item["type"] == "directory"
            ]
        else:
            found = [item.name for item in os.scandir(root) if item.is_dir()]
        return sorted(item for item in found if not item.startswith("."))

    def list(self, name: str = "") -> list[str]:
        """Names of all files below a folder, with ``/`` between their parts."""
        root = self.path(name).rstrip("/")
        if self.remote:
            return [item[len(root) + 1 :] for item in self._fs.find(root)] if self._fs.isdir(root) else []
        found = []
        for folder, _, names in os.walk(root, followlinks=True):
            inner = os.path.relpath(folder, root)
            found += [name if inner == "." else f"{inner}/{name}" for name in names]
        return found

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with self.open(name) as file:
            return file.read()

    def start(self, name: str, size: int) -> bytes:
        """The first bytes of a file, at most ``size``."""
        with self.open(name) as file:
            return file.read(size)

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset``; the file stays open for the next call.

        Raises:
            InputError: the file ends before.
        """
        file = self._open.pop(name, None) or self.open(name)
        self._open[name] = file
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)[1].close()
        file.seek(offset)
        content: bytes = file.read(size)
        if len(content) != size:
            raise InputError(f"{name}: ends at byte {offset + len(content)}, wanted {offset + size}; it is truncated")
        return content

    def size(self, name: str) -> int:
        """Bytes of a file."""
        path = self.path(name)
        try:
            return int(self._fs.size(path) if self.remote else os.path.getsize(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None

    def identity(self, names: Iterable[str]) -> str:
        """Hash of files, see the module."""
        sizes = {name: self.size(name) for name in names}
        whole = sum(sizes.values()) <= HASHED_WHOLE
        digest = hashlib.sha256()
        for name, size in sizes.items():
            digest.update(f"{os.path.basename(name) if not self._root else name}\0{size}\0".encode())
            with self.open(name) as file:
                if whole or size <= 2 * _BLOCK:
                    while block := file.read(_BLOCK):
                        digest.update(block)
                else:
                    digest.update(file.read(_BLOCK))
                    file.seek(size - _BLOCK)
                    digest.update(file.read(_BLOCK))
        return digest.hexdigest()


def map_member(tree: FileTree, archive: zipfile.ZipFile, info: zipfile.ZipInfo, identity: str) -> np.ndarray[Any, Any]:
    """An array of an .npz as a read-only memory map.

    A stored one of a local file is mapped where it lies; any other is unpacked to the cache first.
    """
    local = tree.local()
    if local is None or info.compress_type != zipfile.ZIP_STORED:
        folder = Path(os.environ.get("TSYND_CACHE") or Path.home() / ".cache" / "tsynd").expanduser()
        unpacked = folder / f"{identity[:32]}.npy"
        if not unpacked.exists():
            with atomic_path(unpacked) as temporary, archive.open(info) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 16 * _BLOCK)  # also checks the CRC
        return cast("np.ndarray[Any, Any]", np.load(unpacked, mmap_mode="r", allow_pickle=False))
    with local.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise InputError(f"{tree.text}: damaged .npz file (no header at {info.header_offset})")
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
        offset = file.tell()
    if dtype.hasobject or fortran:
        raise InputError(f"{tree.text}: {info.filename} holds Python objects or Fortran order; wanted plain C arrays")
    if offset + int(np.prod(shape)) * dtype.itemsize > local.stat().st_size:
        raise InputError(f"{tree.text}: truncated .npz file")
    return np.memmap(local, dtype, "r", offset, shape)


@dataclass(frozen=True, slots=True)
class Record:
    """Where a sample of a tar lies: (offset, size) of its parts."""

    tar: str
    key: str
    suffix: str
    image: tuple[int, int]
    json: tuple[int, int] | None
    cls: tuple[int, int] | None


def index_tar(tree: FileTree, name: str) -> Iterator[Record]:
    """The samples of a tar that hold an image; only headers are read.

    Raises:
        InputError: no tar, or a damaged one.
    """
    key = ""
    parts: dict[str, tuple[int, int]] = {}

    def record() -> Iterator[Record]:
        suffix = next((s for s in _IMAGES if s in parts), None)
        if suffix is not None:
            yield Record(name, key, suffix, parts[suffix], parts.get(".json"), parts.get(".cls"))

    try:
        with tree.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, end = base.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if this != key:
                    yield from record()
                    key, parts = this, {}
                parts[f".{end.lower()}"] = (member.offset_data, member.size)
            yield from record()
    except tarfile.TarError as error:
        raise InputError(f"{name}: damaged or no tar ({error})") from None
