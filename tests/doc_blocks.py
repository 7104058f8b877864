"""The code blocks of a Markdown page: run by the tests, and by ``python tests/doc_blocks.py PAGE`` to renew its output.

```python blocks of a page run in order in one namespace; ```bash blocks hold `tsynd` commands and run in the same
folder. A block behind a line `<!-- not run: REASON -->` is left out. A ```text block behind a block is its output.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Block", "blocks_of", "run_page"]

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n\n?)?"
    r"(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# what makes a command short enough for a test, unless the page says it
_SHORT = {
    "run": "--iterations 2 --autoencoder-iterations 2 --train-size 12",
    "train": "--iterations 2 --train-size 12",
    "experiment": "--iterations 2 --autoencoder-iterations 2 --workers 1 --seeds 1 --conditions clean --attacks fgsm",
    "synthesize": "--steps 1 --train-size 12",
    "export": "--steps 1",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: where its code begins, and why it is not run (None: it is)."""

    language: str
    code: str
    line: int
    reason: str | None
    end: int


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [
        Block(m["language"], m["code"], text[: m.start("code")].count("\n") + 1, m["reason"], m.end())
        for m in _FENCE.finditer(text)
    ]


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path


def run_page(page: Path, folder: Path, short: bool) -> list[tuple[Block, str]]:
    """Run a page's blocks in a folder; returns each with what it printed.

    Args:
        page: the Markdown file.
        folder: where the blocks read and write.
        short: cut training to six iterations, for tests.

    Raises:
        AssertionError: a block fails, or is a shell command that is neither tsynd's nor marked as not run.
    """
    names: dict[str, Any] = {"__name__": "__page__"}
    done = []
    with _inside(folder):
        for block in blocks_of(page.read_text(encoding="utf-8")):
            if block.reason is not None or block.language not in ("python", "bash"):
                continue
            where = f"{page.name}:{block.line}"
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if block.language == "python":
                    code = block.code
                    if short:
                        code = re.sub(r"\biterations=\d+", "iterations=6", code)
                        code = re.sub(r"\battack_images=\d+", "attack_images=8", code)
                    exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)
                else:
                    for command in _commands(block.code, where):
                        _tsynd(command, where, short)
            done.append((block, printed.getvalue()))
    return done


def _commands(code: str, where: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "tsynd", (
                f"{where}: {words[0]!r} is run by nobody; mark the block as not run, and say why"
            )
            yield words[1:]


def _tsynd(words: list[str], where: str, short: bool) -> None:
    from tsynd.cli import main

    if short:
        extra = _SHORT.get(words[0], "").split() if not {"--model", "encoder", "decoder"} & set(words) else []
        words = [*words]
        for option, value in zip(extra[::2], extra[1::2], strict=True):
            if option == "--train-size" and "--shard-size" in words:
                continue
            if option not in words:
                words += [option, value]
            elif "iterations" in option:
                words[words.index(option) + 1] = value
    before = sys.argv
    sys.argv = ["tsynd", *words]
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    assert not code, f"{where}: tsynd {shlex.join(words)} ended with {code}"


def main() -> None:
    """Run a page at full length, put what its blocks print into its text blocks, and its pictures into images/."""
    page = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        done = run_page(page, Path(name), short=False)
        for picture in sorted(Path(name).glob(f"{page.stem}_*.png")):
            shutil.copy(picture, page.parent / "images" / picture.name)
    text, found = page.read_text(), blocks_of(page.read_text())
    for block, printed in reversed(done):
        after = found[found.index(block) + 1] if block != found[-1] else None
        if after is not None and after.language == "text":
            start = text.index("\n", block.end + text[block.end :].index("```")) + 1
            text = text[:start] + printed.rstrip() + "\n" + text[after.end - 3 :]
    page.write_text(text)


if __name__ == "__main__":
    main()
