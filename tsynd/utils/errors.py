"""Errors that tell a user what came, what was wanted and what to do."""

from __future__ import annotations

import importlib
import unicodedata
from collections.abc import Sequence
from types import ModuleType

__all__ = ["InputError", "MissingExtraError", "check_choice", "check_whole", "first_line", "printable", "require"]


def printable(text: str) -> str:
    """Text that every terminal, page and file can show: control characters and bytes of no text become escapes."""
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
        for char in text
    )


class InputError(ValueError):
    """An argument or a file that cannot be used; the message names it, what came and what is wanted."""

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))  # it may quote what a stranger wrote


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name of the module to import.
        extra: name of the tsynd extra that installs it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        importlib.import_module(module.split(".")[0])  # a package that is blocked may have left its parts behind
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs the package {module.split('.')[0]!r}: pip install 'tsynd[{extra}]'"
        ) from error


def check_choice(name: str, value: str, wanted: Sequence[str]) -> None:
    """Raise :class:`InputError` unless the value is one of those wanted."""
    if value not in wanted:
        raise InputError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, wanted))}")


def check_whole(name: str, value: object, least: int = 1, optional: bool = False) -> None:
    """Raise :class:`InputError` unless the value is an integer of at least ``least``, or None where it is optional."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = f"an integer of at least {least}{', or None' if optional else ''}"
        raise InputError(f"{name}: got {value!r}, wanted {wanted}")


def first_line(error: BaseException) -> str:
    """What another library said, short enough for one line; the error's kind where it said nothing."""
    said = str(error).strip().splitlines()
    return said[0][:200] if said else type(error).__name__
