"""The report: one file, the measured numbers, any kind of data, whole or not at all."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tsynd import InputError
from tsynd.report import plots as figures
from tsynd.report import run_report as report
from tsynd.synthesis.result import SynthesisResult

NAMES = ("normal", "<b>odd</b>", "a & $b$")


def inputs(channels: int = 1, multilabel: bool = False, count: int = 30, **changes: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, 8, 8, generator=draw)
    before = torch.rand(count, generator=draw) * 0.01 + 0.01
    labels = torch.eye(3)[torch.arange(count) % 3].roll(1, 0) if multilabel else torch.arange(count) % 3
    if multilabel:
        labels[0::3], labels[1::3] = 0, 1
    path = torch.stack([before * (1 + 0.2 * k) for k in range(4)], 1)
    z = torch.zeros(count, 4)
    status = torch.zeros(count, dtype=torch.int8)
    result = SynthesisResult(images, labels, z, z, path[:, 0], path[:, -1], path, status, torch.arange(count))
    row = {"balanced_accuracy": 0.812, "accuracy": 0.834, "auroc": 0.9}
    metrics: dict[str, Any] = {
        "data": {"name": "<script>alert(1)</script>", "test": 624},
        "synthesis": {
            "images": count, "uncertainty_before": 0.0151, "uncertainty_after": 0.0234, "raised_fraction": 0.967,
            "images_per_second": 12.0, "status": {"raised": count - 1, "unchanged": 1},
        },
        "evaluation": {
            "real": {"clean": row, "noise": row, "rotation": row},
            "targeted": {
                "clean": {**row, "balanced_accuracy": 0.835},
                "noise": {**row, "balanced_accuracy": 0.779},
                "rotation": {**row, "auroc": math.nan},
            },
        },
    }  # fmt: skip
    return {
        "metrics": metrics, "result": result, "sources": images, "reconstructions": images.flip(0),
        "class_names": NAMES, "fresh_before": before, "fresh_after": before * 1.5, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("multilabel", [False, True])
def test_self_contained_and_escaped(tmp_path: Path, channels: int, multilabel: bool) -> None:
    page = report.write_report(tmp_path / "r.html", **inputs(channels, multilabel)).read_text()
    assert not re.search(r"https?:|<script|<link|<iframe|@import|url\((?!#)", page)
    sources = re.findall(r'\ssrc="([^"]*)"', page)
    assert len(sources) == 4 * 12
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert page.count(' alt="') == len(sources)
    assert page.count("<svg") == page.count("aria-label=") == 2
    assert "<b>odd</b>" not in page
    assert "&lt;b&gt;odd&lt;/b&gt;" in page
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert {name for name in re.findall(r'(?:href="|url\()#([^")]*)', page)} <= set(ids)
    if multilabel:
        assert "<b>normal, &lt;b&gt;odd&lt;/b&gt;, a &amp; $b$</b>" in page


def test_says_what_was_measured(tmp_path: Path) -> None:
    page = report.write_report(tmp_path / "r.html", **inputs()).read_text()
    wanted = ("0.0151", "0.0234", "96.7 %", "gained 2.3 points on clean", "lost 3.3 points on noise")
    for text in (*wanted, "changed nothing on rotation", "+2.3</td>", "−3.3</td>", "±0.0</td>", "–</td>"):
        assert text in page
    assert "half-width of 2.9 percentage points" in page  # 1.96 * sqrt(0.834 * 0.166 / 624)
    again = report.write_report(tmp_path / "again.html", **inputs()).read_text()
    assert page == again


def test_odd_uncertainties(tmp_path: Path) -> None:
    """Not finite, all zero, or spread over many decades."""
    for values in (torch.full((30,), math.nan), torch.zeros(30), torch.logspace(-8, 0, 30)):
        given = inputs(fresh_before=values, fresh_after=values)
        given["result"].trajectory[::2] = math.nan
        report.write_report(tmp_path / "r.html", **given)


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_examples_cover_classes_and_gains(classes: int) -> None:
    gain = torch.rand(200, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(200) % classes
    chosen = figures.spread(labels, gain, 12)
    assert len(set(chosen)) == 12
    assert len(set(labels[chosen].tolist())) == min(classes, 12)
    assert gain[chosen].min() < 0.35
    assert gain[chosen].max() > 0.65


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        report.write_report(tmp_path / "file" / "r.html", **inputs())
    (tmp_path / "r.html").write_text("old")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        report.write_report(tmp_path / "r.html", **inputs())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "r.html"]
    assert (tmp_path / "r.html").read_text() == "old"


@pytest.mark.parametrize("name", ["sources", "reconstructions", "fresh_before", "fresh_after", "class_names"])
def test_refuses_what_does_not_belong_together(tmp_path: Path, name: str) -> None:
    given = inputs()
    given[name] = given[name][:2]
    with pytest.raises(InputError, match=name):
        report.write_report(tmp_path / "r.html", **given)


@pytest.mark.parametrize("channels", [1, 3])
def test_draw_examples(tmp_path: Path, channels: int) -> None:
    images: Tensor = torch.rand(9, channels, 8, 8)
    texts = ["$x", "<b>", "a_very long name of a class indeed"] * 3
    path = figures.draw_examples(
        tmp_path / "e.png", images, images, images.flip(0), torch.rand(9), torch.rand(9), texts, count=2
    )
    assert path.read_bytes().startswith(b"\x89PNG")
