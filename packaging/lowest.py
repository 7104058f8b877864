"""The lowest versions that pyproject.toml declares, a pin a line: ``python packaging/lowest.py EXTRA ...``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

_OWN = re.compile(r"tsynd\[(?P<extras>[^\]]+)\]")
_BOUND = re.compile(r"(?P<name>[\w.-]+(?:\[[\w,-]+\])?)\s*(?:>=\s*(?P<version>[\w.]+))?")


def lowest(extras: list[str], project: dict[str, object]) -> list[str]:
    """Pins of the project's own requirements and of those of extras.

    Raises:
        ValueError: a requirement without a lower bound.
    """
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    asked, pins = [*project["dependencies"], *(one for extra in extras for one in optional[extra])], {}
    while asked:
        one = asked.pop(0)
        if own := _OWN.fullmatch(one):
            asked += [inner for extra in own["extras"].split(",") for inner in optional[extra]]
            continue
        bound = _BOUND.fullmatch(one)
        if bound is None or bound["version"] is None:
            raise ValueError(f"{one!r}: wanted NAME>=VERSION")
        pins[bound["name"]] = max(pins.get(bound["name"], "0"), bound["version"], key=_numbers)
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


if __name__ == "__main__":
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    print("\n".join(lowest(sys.argv[1:], tomllib.loads(text)["project"])))
