"""Folders and classes with names that are no text, in locales that are no UTF-8: everything is written all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tsynd.utils.errors import InputError, printable

pytest.importorskip("typer")
pillow = pytest.importorskip("PIL.Image")

_FLAGS = ["--train-size", "8", "--autoencoder-iterations", "2", "--iterations", "2", "--samples", "4", "--steps", "1"]
# the locale's own encoding, Python's way round it switched off
_LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "UTF-8": {"LC_ALL": "C.UTF-8"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Class folders: one with bytes that are no UTF-8, one with a terminal's control characters."""
    folder = os.fsencode(tmp_path_factory.mktemp("names")) + b"/da_ta-\xe9"
    random = np.random.default_rng(0)
    for split, count in ((b"train", 8), (b"val", 4), (b"test", 4)):
        for name in (b"knot\xff", b"cyst\x1b[31m\x07"):
            inside = b"/".join((folder, split, name))
            os.makedirs(inside)
            for i in range(count):
                picture = pillow.fromarray(random.integers(0, 256, (16, 16), np.uint8))
                with open(inside + b"/%d.png" % i, "wb") as file:
                    picture.save(file, "PNG")
    return folder


def _tsynd(locale: str, *arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | _LOCALES[locale] | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tsynd", *arguments]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert b"\x1b[31m" not in done.stdout + done.stderr
    assert b"\x07" not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize("locale", list(_LOCALES))
def test_a_run(data: bytes, tmp_path: Path, locale: str) -> None:
    output = os.fsencode(tmp_path) + b"/out-\xff"
    _tsynd(locale, "run", "--data", data, "--output", output, *_FLAGS, "--quiet")
    folder = Path(os.fsdecode(output))
    card = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
    assert card["class_names"] == ["cyst\\x1b[31m\\x07", "knot\\udcff"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "knot\\udcff" in page
    assert "\x1b" not in page


@pytest.mark.slow
def test_a_study(data: bytes, tmp_path: Path) -> None:
    output = os.fsencode(tmp_path) + b"/out-\xff"
    more = ["--seeds", "1", "--arms", "real", "reconstruction", "--conditions", "clean", "--attacks", "none"]
    _tsynd("C", "experiment", "--data", data, "--output", output, *_FLAGS, *more, "--workers", "1", "--quiet")
    text = (Path(os.fsdecode(output)) / "results.md").read_text(encoding="utf-8")
    assert text.startswith(r"# Study on da\_ta\-\\udce9")


def test_what_can_be_printed_stays() -> None:
    assert printable("Lunge, links – 肺　é") == "Lunge, links – 肺　é"
    assert printable("a\nb\x1b[0m\u202e\udcff") == "a\\nb\\x1b[0m\\u202e\\udcff"
    assert str(InputError("one\ntwo \x1b")) == "one\ntwo \\x1b"
