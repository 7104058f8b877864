"""Settings as dataclasses that keywords apply to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from tsynd.utils.errors import InputError

__all__ = ["override"]

Settings = TypeVar("Settings")


def override(settings: Settings, options: Mapping[str, Any], what: str) -> Settings:
    """The settings, a dataclass, with other values for the fields that ``options`` name.

    Args:
        settings: a dataclass.
        options: field → value.
        what: the settings are of, for messages.

    Raises:
        InputError: an option of another name, or a value out of range.
    """
    names = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    if unknown := [name for name in options if name not in names]:
        raise InputError(f"{unknown[0]}: is no setting of {what}, wanted one of {', '.join(names)}")
    return replace(settings, **options)  # type: ignore[type-var]
