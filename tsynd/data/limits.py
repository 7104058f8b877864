"""Limits of what a file may take, checked before work and raised by the variables that their names make.

``TSYND_LIMIT_VALUES=4e9 tsynd run ...`` raises the limit VALUES; docs/own_data.md has the table.
"""

from __future__ import annotations

import os

from tsynd.utils.errors import InputError

__all__ = ["LIMITS", "check_expansion", "check_limit", "limit"]

LIMITS: dict[str, tuple[float, str]] = {
    "VALUES": (2**28, "values (pixels times channels and frames) of one image file"),
    "EXPANDED": (2**30, "bytes that a compressed file or member may grow to beyond 100 times its size"),
    "TABLE": (2**30, "bytes of a table, and of the columns read from a Parquet file"),
    "ROWS": (2**24, "rows of a table, files of a folder or members of a tar"),
    "CLASSES": (2**16, "classes, by the highest class number"),
    "NAMES": (2**17, "names that a pattern such as {000..099} is written out to"),
    "JSON": (2**20, "bytes of a JSON or class member of a tar"),
}


def limit(name: str) -> int:
    """A limit's value.

    Raises:
        InputError: its variable holds no number above 0.
    """
    text = os.environ.get(f"TSYND_LIMIT_{name}")
    try:
        value = float(text) if text else LIMITS[name][0]
        if not 0 < value < 2**62:
            raise ValueError
    except ValueError:
        raise InputError(f"TSYND_LIMIT_{name}: {text!r}; wanted a number above 0") from None
    return int(value)


def check_limit(name: str, value: int, where: str) -> None:
    """Raise :class:`InputError` where a value is above its limit."""
    if value > (most := limit(name)):
        raise InputError(
            f"{where}: {value:,} {LIMITS[name][1]}; wanted at most {most:,} (the variable TSYND_LIMIT_{name} raises it)"
        )


def check_expansion(compressed: int, expanded: int, where: str) -> None:
    """Raise :class:`InputError` where bytes grow to more than a file of images does."""
    if expanded > 100 * compressed:
        check_limit("EXPANDED", expanded, where)
