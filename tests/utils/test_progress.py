"""Progress without a terminal: lines with an estimate, also while nothing is reported."""

from __future__ import annotations

import re
import time

import pytest

from tsynd.utils import progress


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.05)
    monkeypatch.setattr(progress, "EVERY", 0.2)
    with progress.progress_bar("synthesising", 40) as report:
        report(10, "0.1 → 0.2")
        time.sleep(0.6)  # nothing is reported, the log speaks all the same
        report(30, "")
    out, lines = capsys.readouterr()
    assert out == ""
    said = lines.splitlines()
    assert len(said) >= 3
    assert re.fullmatch(r"synthesising: 10 of 40 in \d s, about \d s left; 0\.1 → 0\.2", said[0])
    assert re.fullmatch(r"synthesising: 40 of 40 in \d s", said[-1])


def test_what_was_done_before_is_not_the_pace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.3)
    monkeypatch.setattr(progress, "EVERY", 0.3)
    with progress.progress_bar("training", 10_000) as report:
        report(9_000, "resumed")
        time.sleep(0.5)
        report(1, "")
        time.sleep(0.5)
    said = capsys.readouterr().err.splitlines()
    assert not [line for line in said if "9000 of" in line and "left" in line]
    assert re.fullmatch(r"training: 9001 of 10000 in \d+ s, about \d+ min \d+ s left", said[-1])  # a step, 999 to go


def test_short_work_and_quiet_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress.progress_bar("short", 2) as report:
        report(2, "")
    monkeypatch.setattr(progress, "FIRST", 0.01)
    with progress.progress_bar("hidden", 2, shown=False) as report:
        time.sleep(0.05)
        report(2, "")
    assert capsys.readouterr() == ("", "")
