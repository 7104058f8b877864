"""Functions and classes that a caller names as MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from tsynd.utils.errors import InputError
from tsynd.utils.fingerprint import hash_parts

__all__ = ["call_digest", "call_of", "is_call", "name_of"]


def is_call(text: str) -> bool:
    """Whether a text has the form MODULE:FUNCTION, the module and the function possibly dotted."""
    module, _, path = text.partition(":")
    return bool(path) and all(part.isidentifier() for part in (*module.split("."), *path.split(".")))


def call_of(text: str, what: str) -> Callable[..., Any]:
    """What ``MODULE:FUNCTION`` names; the module is installed, or a file in the current folder.

    Args:
        text: of that form.
        what: the argument, for messages.

    Raises:
        InputError: there is no such thing.
    """
    module, _, path = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # at the end: it must not hide what is installed
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{what}: {text}: {error}; wanted MODULE:FUNCTION that is installed or in the current folder"
        ) from error
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InputError(f"{what}: {text}: {module} has no {path}, wanted a function or class")
    return found  # type: ignore[no-any-return]


def name_of(function: Any, what: str) -> str:
    """``MODULE:FUNCTION`` of a function or class, by which other processes find it; a text stays as it is.

    Raises:
        InputError: it cannot be found by a name: a lambda, or one made inside another function.
    """
    if isinstance(function, str):
        return function
    name = f"{getattr(function, '__module__', None)}:{getattr(function, '__qualname__', None)}"
    if not is_call(name) or call_of(name, what) is not function:
        raise InputError(f"{what}: got {function!r}, wanted a text, or a function or class at the top of a module")
    return name


def call_digest(text: str, what: str) -> str:
    """SHA-256 of the source text of what MODULE:FUNCTION names; of its module's where it has none of its own."""
    found = call_of(text, what)
    for part in (found, sys.modules[text.partition(":")[0]]):
        try:
            return hash_parts(inspect.getsource(part))
        except (TypeError, OSError):
            continue
    return hash_parts(text)  # compiled: its name alone
