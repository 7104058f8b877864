"""The report: one file, the measured numbers, any kind of data, whole or not at all."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tsynd import InputError
from tsynd.evaluation.intervals import compare
from tsynd.report import pictures as figures
from tsynd.report import run_report as report
from tsynd.report.verdict import Interval, images_needed, range_text, verdict
from tsynd.synthesis.result import SynthesisResult

NAMES = ("normal", "<b>odd</b>", "a & $b$")


def simulate(count: int, gain: float, few: int | None = None) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """Labels of two classes, and logits of four classifiers: the last is right for a share ``gain`` more."""
    draw = torch.Generator().manual_seed(2)
    labels = torch.cat([torch.zeros(count if few is None else few), torch.ones(count)]).long()
    hard, found = torch.rand(len(labels), generator=draw), {}
    for name in ("real", "standard", "reconstruction", "targeted"):
        own = torch.rand(len(labels), generator=draw) * 0.1
        right = hard + own < 0.8 + (gain if name in ("targeted", "standard") else 0)
        answers = torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).float()
        found[name] = {"clean": answers, "noise": answers}
    return labels, found


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
    truth, logits = simulate(**{"count": 300, "gain": 0.05, **changes.pop("test", {})})
    metrics: dict[str, Any] = {
        "data": {"name": "<script>alert(1)</script>", "test_counts": {"<i>sick</i>": 300, "well": 300}},
        "reconstruction": {"by_class": {"sick": 0.03, "well": 0.88}}, "study_command": "tsynd experiment --data 'a b'",
        "synthesis": {
            "images": count, "uncertainty_before": 0.0151, "uncertainty_after": 0.0234, "raised_fraction": 0.967,
            "images_per_second": 12.0, "status": {"raised": count - 1, "unchanged": 1},
        },
        "comparison": compare(logits, truth),
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
    """With 300 test images of each class a gain is stated with its interval, and not credited to the wrong thing."""
    given = inputs()
    page = report.write_report(tmp_path / "r.html", **given).read_text()
    change, low, high = given["metrics"]["comparison"]["changes"]["real"]["clean"]["balanced_accuracy"]
    assert 0 < low < change < high
    wanted = f"gained {100 * change:.1f} points (95 % interval +{100 * low:.1f} to +{100 * high:.1f})"
    for text in (
        wanted,
        "It cannot be told from standard augmentation",
        "more than reconstructions",
        "0.0234",
        "0.0151",
    ):
        assert text in page
    assert page.index(wanted) < page.index("<h2>")
    assert '<td class="up">' in page
    assert "does not yet reproduce your pictures of well" in page
    assert "pictures of sick" not in page
    assert "300 of &lt;i&gt;sick&lt;/i&gt;" in page
    assert "tsynd experiment --data &#x27;a b&#x27;" in page
    again = report.write_report(tmp_path / "again.html", **inputs()).read_text()
    assert page == again


def test_claims_nothing_from_two_images_of_a_class(tmp_path: Path) -> None:
    page = report.write_report(tmp_path / "r.html", **inputs(test={"few": 2, "gain": 0.2})).read_text()
    lead = page[page.index('<p class="lead">') : page.index("<h2>")]
    assert "cannot tell whether the extra images help: a class has only 2 test images" in lead
    for claim in ("gained", "lost", "points"):
        assert claim not in lead
    assert '<td class="up">' not in page
    assert '<td class="down">' not in page


def test_a_small_change_is_noise_and_says_how_many_images_it_would_take(tmp_path: Path) -> None:
    given = inputs(test={"count": 40, "gain": 0.03})
    page = report.write_report(tmp_path / "r.html", **given).read_text()
    change = Interval(*given["metrics"]["comparison"]["changes"]["real"]["clean"]["balanced_accuracy"])
    assert not change.clear
    needed = images_needed(change, 80)
    assert f"which is within noise (95 % interval {range_text(change)}; a change of that size would need about" in page
    assert f"about {needed:,} test images".replace(",", " ") in page
    assert '<td class="up">' not in page
    assert images_needed(Interval(0.01, -0.03, 0.05), 100) == 1600
    assert images_needed(Interval(0.0, -0.03, 0.05), 100) is None


def test_guessing_is_called_guessing(tmp_path: Path) -> None:
    """Classifiers that have learnt nothing differ by chance: said before any change is read."""
    draw = torch.Generator().manual_seed(1)
    truth = torch.arange(200) % 2
    blind = {name: {"clean": torch.rand(200, 2, generator=draw)} for name in ("real", "standard", "targeted")}
    said = "None of these classifiers can be told from guessing"
    assert said in verdict(compare(blind, truth))[0]
    blind["targeted"]["clean"] += torch.nn.functional.one_hot(truth, 2) / 2
    assert not [text for text in verdict(compare(blind, truth)) if said in text]


def test_what_to_do_now_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that the page shows make the pictures that it promises."""
    given = inputs()
    page = report.write_report(tmp_path / "my run" / "r.html", **given).read_text()
    given["result"].save(tmp_path / "my run" / "synthetic.npz")
    lines = html.unescape(page).splitlines()
    assert "<pre>tsynd predict --classifier my run/classifier.safetensors --data FOLDER" in html.unescape(page)
    saving = next(line for line in lines if line.startswith("load_result("))
    monkeypatch.chdir(tmp_path)
    exec(next(line for line in lines if line.startswith("from tsynd")) + "\n" + saving.removesuffix("</pre>"), {})
    assert len(list((tmp_path / "targeted").rglob("*.png"))) == 30


def test_what_a_picture_is_taken_for(tmp_path: Path) -> None:
    given = inputs()
    judged = torch.full((30, 3), 0.1)
    judged[:, 0] = 0.8
    page = report.write_report(tmp_path / "r.html", judged=judged, **given).read_text()
    assert page.count("<span>normal 80 %</span>") == 12
    assert page.count("flipped") - page.count(".flipped") == 8  # the labels 1 and 2 of twelve pictures


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
