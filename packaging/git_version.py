"""The version from git tags, as a metadata provider of scikit-build-core that needs git alone.

A tag v1.2.3 gives 1.2.3; n commits behind it 1.2.4.devN+gHASH (`.dirty` with changes not committed); before the first
tag 0.1.0.devN+gHASH. An sdist carries its version in PKG-INFO. Elsewhere (a copy without git) TSYND_VERSION says it,
or it is 0.0.0+unknown.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

__all__ = ["dynamic_metadata", "from_describe"]

_ROOT = Path(__file__).resolve().parent.parent


def dynamic_metadata(
    field: str, settings: Mapping[str, object] | None = None, project: Mapping[str, object] | None = None
) -> str:
    """What scikit-build-core calls."""
    if field != "version":
        raise ValueError(f"git_version: gives the version, not {field!r}")
    if given := os.environ.get("TSYND_VERSION"):
        return given
    if (info := _ROOT / "PKG-INFO").exists():
        return str(email.message_from_string(info.read_text())["Version"])
    if (_ROOT / ".git").exists():
        described = _git("describe", "--tags", "--long", "--dirty", "--match", "v[0-9]*")
        if described is None and (commit := _git("rev-parse", "--short", "HEAD")) is not None:
            dirty = "-dirty" if _git("status", "--porcelain", "--untracked-files=no") else ""
            described = f"v0.1.0.dev0-{_git('rev-list', '--count', 'HEAD')}-g{commit}{dirty}"
        if described is not None:
            return from_describe(described)
    return "0.0.0+unknown"


def from_describe(described: str) -> str:
    """The PEP 440 version of what `git describe --long --dirty` says, such as v1.2.3-4-gabc1234-dirty."""
    found = re.fullmatch(r"v(\d+\.\d+\.)(\d+)([^-]*)-(\d+)-g([0-9a-f]+)(-dirty)?", described)
    if found is None:
        raise ValueError(f"git_version: {described!r}; wanted a tag such as v1.2.3 or v1.2.3rc1")
    series, patch, suffix, commits, commit, dirty = found.groups()
    if commits == "0" and not dirty and ".dev" not in suffix:
        return f"{series}{patch}{suffix}"
    last = patch if suffix else str(int(patch) + 1)  # behind 1.2.3rc1 still comes 1.2.3
    return f"{series}{last}.dev{commits}+g{commit}{'.dirty' if dirty else ''}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
