"""Names of networks: ``KIND:NAME,option=value,...``, and which code they may call."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tsynd.utils.calls import call_of, is_call
from tsynd.utils.errors import InputError

__all__ = ["Source", "parse_source", "trusted"]

_TRUST = "TSYND_TRUSTED_MODULES"
_trusted: set[str] = set()


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        text: as it was written.
        kind: ``timm``, ``hf``, ``diffusers``, ``monai-bundle``, or ``call`` for MODULE:FUNCTION.
        name: what follows the colon, without options; for ``call`` the whole MODULE:FUNCTION.
        options: what follows the commas.
    """

    text: str
    kind: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def function(self, known: bool, what: str = "classifier") -> Callable[..., Any]:
        """What ``MODULE:FUNCTION`` names.

        Args:
            known: the caller's own words name it. A file's words may name a class of networks (or its class methods)
                alone, or what is trusted: a file must not be able to call anything that is installed.
            what: the argument, for messages.

        Raises:
            InputError: there is no such thing, or a file names what is not trusted.
        """
        module = self.name.partition(":")[0]
        if not known and module not in _trusted | set(os.environ.get(_TRUST, "").split(",")):
            raise InputError(
                f"{what}: its file says to call {self.name}, which a file may not; if you trust it, set "
                f"{_TRUST}={module}, or name it in tsynd.{what} first"
            )
        return call_of(self.name, what)


def parse_source(text: str) -> Source:
    """A network's source from ``timm:NAME``, ``hf:NAME`` or ``MODULE:FUNCTION``, each with ``,option=value,...``.

    Values are numbers, true, false, null, or words.

    Raises:
        InputError: no such form.
    """
    name, *settings = text.split(",")
    kind, colon, rest = name.partition(":")
    if not colon or not rest or not kind:
        raise InputError(
            f"classifier: got {text!r}, wanted timm:NAME, hf:NAME, MODULE:FUNCTION, small, or a .safetensors file"
        )
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"classifier: got {setting!r} in {text!r}, wanted option=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    if kind in ("timm", "hf", "diffusers", "monai-bundle"):
        return Source(text, kind, rest, options)
    if not is_call(name):
        raise InputError(f"classifier: got {text!r}, wanted timm:NAME, hf:NAME or MODULE:FUNCTION")
    return Source(text, "call", name, options)


def trusted(source: Source) -> None:
    """Note that the user named this source, so that a file of this process's network can be read again."""
    if source.kind == "call":
        _trusted.add(source.name.partition(":")[0])
