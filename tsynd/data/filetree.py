"""Files of a data source, on this machine or behind an fsspec address, read by position.

``identity`` hashes are over every file's name, size and bytes; beyond ``HASHED_WHOLE`` bytes in all, over each file's
first and last mebibyte.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
import stat
import tarfile
import tempfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from tsynd.data.limits import check_expansion, check_limit
from tsynd.utils.errors import InputError, require
from tsynd.utils.fingerprint import _BLOCK

__all__ = ["HASHED_WHOLE", "FileTree", "Record", "index_tar", "read_array"]

HASHED_WHOLE = 4 * 2**30
_OPEN = 64  # files kept open at once
_IMAGES = (".png", ".jpg", ".jpeg", ".npy", ".bmp", ".tif", ".tiff")


def _expand(text: str) -> list[str]:
    """``{000..099}`` written out."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if found is None:
        return [text]
    first, last = found.groups()
    check_limit("NAMES", max(0, int(last) - int(first) + 1), text)
    numbers = range(int(first), int(last) + 1)
    names = []
    for n in numbers:
        names += _expand(f"{text[: found.start()]}{n:0{len(first)}d}{text[found.end() :]}")
        check_limit("NAMES", len(names), text)
    return names


class _Guarded:
    """A file system or file behind an address: what its client raises, whatever that is, is one clear error."""

    def __init__(self, inner: Any, where: str) -> None:
        self._inner, self._where = inner, where

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                out = found(*arguments, **options)
            except Exception as error:
                reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
                raise InputError(f"{self._where}: cannot be read ({reason})") from None
            return _Guarded(out, self._where) if name == "open" else out

        return call

    def __enter__(self) -> _Guarded:
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.close()


def _web_client() -> dict[str, Any]:
    """How aiohttp asks a web server: it may not take for ever, nor send us to another host or off https."""
    aiohttp = require("aiohttp", "big")

    async def follow(session: object, context: object, asked: Any) -> None:
        to = asked.url.join(type(asked.url)(asked.response.headers.get("Location", "")))
        if to.host != asked.url.host or (asked.url.scheme, to.scheme) == ("https", "http"):
            raise OSError(f"the server points to {to.origin()}; wanted no other host: give that address yourself")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(follow)
    return {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60), "trace_configs": [trace]}


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
                options = {"client_kwargs": _web_client()} if text.startswith(("http://", "https://")) else {}
                system, root = require("fsspec", "big").core.url_to_fs(text, **options)
                self._fs = _Guarded(system, text)
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
        if not self.remote and os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: no regular file; wanted one, neither a folder nor a pipe or device")
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
            try:
                found = [item.name for item in os.scandir(root) if item.is_dir()]
            except OSError as error:
                raise InputError(f"{root}: cannot be read ({error.strerror or error})") from None
        return sorted(item for item in found if not item.startswith("."))

    def files(self, name: str = "") -> list[str]:
        """Names of the files in a folder itself, without hidden ones."""
        root = self.path(name).rstrip("/")
        if self.remote:
            held = [os.path.basename(item["name"]) for item in self._fs.ls(root, detail=True) if item["type"] == "file"]
        else:
            held = [item.name for item in os.scandir(root) if not item.is_dir()]
        return [item for item in held if not item.startswith(".")]

    def list(self, name: str = "") -> list[str]:
        """Names of all files below a folder, with ``/`` between their parts; hidden ones are left out.

        Raises:
            InputError: a folder that cannot be read, or one that lies in itself by a link.
        """
        root = self.path(name).rstrip("/")
        if self.remote:
            return [item[len(root) + 1 :] for item in self._fs.find(root)] if self._fs.isdir(root) else []
        found: list[str] = []

        def walk(folder: str, inner: str, above: tuple[tuple[int, int], ...]) -> None:
            try:
                about = os.stat(folder)
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                raise InputError(f"{folder}: cannot be read ({error.strerror or error})") from None
            here = (about.st_dev, about.st_ino)
            if here in above:
                raise InputError(f"{folder}: a link to a folder that it lies in; wanted none")
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    walk(entry.path, f"{inner}{entry.name}/", (*above, here))
                else:
                    found.append(f"{inner}{entry.name}")
            check_limit("ROWS", len(found), root)

        if os.path.isdir(root):
            walk(root, "", ())
        return found

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self._fs.isfile(self.path(name)) if self.remote else os.path.isfile(self.path(name)))

    def is_regular(self, name: str) -> bool:
        """Whether it is a file, or a link to one, that is there: no pipe or device."""
        return self.remote or os.path.isfile(self.path(name))

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


def read_array(tree: FileTree, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """An array of an .npz as a read-only memory map, after its checksum was compared.

    A stored one of a local file is mapped where it lies; any other is unpacked to a temporary file without a name,
    which is gone with the array.

    Raises:
        InputError: damaged, or not as long as its header says.
    """
    where = f"{tree.text}: {info.filename}"
    check_expansion(info.compress_size, info.file_size, where)
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(member)
        start = member.tell()
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects; wanted a plain array")
    order: Any = "F" if fortran else "C"
    if any(side < 0 for side in shape) or start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise InputError(f"{where}: {info.file_size} bytes for an array {list(shape)} of {dtype}; it is truncated")
    local, stored = tree.local(), info.compress_type == zipfile.ZIP_STORED
    target = cast("Any", None if local is not None and stored else tempfile.TemporaryFile())  # noqa: SIM115 (mapped)
    with archive.open(info) as member:  # reading to the end compares the checksum
        while block := member.read(16 * _BLOCK):
            if target is not None:
                target.write(block)
    if local is None or target is not None:
        target.flush()
        return np.memmap(target, dtype, "r", start, shape, order)
    with local.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return np.memmap(local, dtype, "r", info.header_offset + 30 + names + start, shape, order)


@dataclass(frozen=True, slots=True)
class Record:
    """Where a sample of a tar lies: (offset, size) of its parts."""

    tar: str
    key: str
    suffix: str
    image: tuple[int, int]
    json: tuple[int, int] | None
    cls: tuple[int, int] | None


Members = dict[str, tuple[int, int]]


def index_tar(tree: FileTree, name: str) -> tuple[list[Record], Counter[str]]:
    """The samples of a tar that hold an image, and how many members of which kind no sample holds; reads headers only.

    A sample is what shares a name up to its first dot (as in WebDataset), wherever in the tar; where that leaves
    images over, as of ``1.2.840.1.png`` and ``1.2.840.2.png``, what shares a name up to its last dot.

    Raises:
        InputError: no tar, a damaged one, or one that does not end as tars do.
    """
    groups: list[tuple[str, Members]] = []
    last: dict[str, int] = {}
    ignored: Counter[str] = Counter()
    size = tree.size(name)
    try:
        with tree.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for number, member in enumerate(archive):
                check_limit("ROWS", number + 1, name)
                if not member.isfile():
                    if not member.isdir():
                        ignored["links and devices"] += 1
                    continue
                if member.size < 0 or member.offset_data + member.size > size:
                    raise InputError(f"{name}: ends within {member.name!r}; it is truncated")
                folder, _, base = member.name.rpartition("/")
                if base.startswith("."):
                    ignored[base] += 1
                    continue
                stem, _, end = base.partition(".")
                key, part = f"{folder}/{stem}" if folder else stem, f".{end.lower()}"
                if key not in last or part in groups[last[key]][1]:
                    last[key] = len(groups)
                    groups.append((key, {}))
                groups[last[key]][1][part] = (member.offset_data, member.size)
                archive.members = []  # type: ignore[attr-defined]  # or all headers stay in memory
            _check_end(file, archive.offset, name)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: damaged or no tar ({error})") from None
    records: list[Record] = []
    for key, parts in groups:
        found, rest = _samples(name, key, parts)
        records += found
        ignored.update(rest)
    records.sort(key=lambda record: record.image[0])
    return records, ignored


def _check_end(file: BinaryIO, offset: int, name: str) -> None:
    """The zeros that end a tar, and nothing behind them."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < 512:
        raise InputError(f"{name}: has no end mark; it is truncated, copy it again")
    while block:
        if block.count(0) != len(block):
            raise InputError(f"{name}: goes on behind its end mark; damaged, or several tars laid end to end")
        block = file.read(_BLOCK)


def _samples(tar: str, key: str, parts: Members) -> tuple[list[Record], list[str]]:
    """The samples of members that share a key, and the kinds of those that belong to none."""
    plain = next((suffix for suffix in _IMAGES if suffix in parts), None)
    dotted = {part: part.rpartition(".")[0] for part in parts if part.endswith(_IMAGES) and part not in _IMAGES}
    if plain is None and not dotted:
        return [], [_kind(part) for part in parts]
    records, ignored = [], []
    if plain is not None:
        records.append(Record(tar, key, plain, parts[plain], parts.get(".json"), parts.get(".cls")))
    elif len(set(dotted.values())) < len(dotted) or (len(dotted) > 1 and {".cls", ".json"} & set(parts)):
        raise InputError(f"{tar}: sample {key!r} holds several images ({', '.join(dotted)}); wanted one a sample")
    for part, stem in dotted.items():
        json, cls = parts.get(f"{stem}.json"), parts.get(f"{stem}.cls")
        if plain is None:
            json, cls = json or parts.get(".json"), cls or parts.get(".cls")
        elif json is None and cls is None:
            ignored.append("second images of a sample")
            continue
        records.append(Record(tar, key + stem, part[len(stem) :], parts[part], json, cls))
    used = {place for record in records for place in (record.image, record.json, record.cls)}
    return records, ignored + [_kind(part) for part in parts if parts[part] not in used and part not in dotted]


def _kind(name: str) -> str:
    base = name.rpartition("/")[2]
    return f".{base.rpartition('.')[2].lower()}" if "." in base else "without suffix"
