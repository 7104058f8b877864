"""Splits keep a patient on one side, are stratified as well as that allows, and repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tsynd.data.load import load_data
from tsynd.data.splits import check_apart, split, stratified_order
from tsynd.utils.errors import InputError


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and patients: few or many, of one class or mixed, with one image or dozens."""
    classes = draw(st.integers(2, 4))
    count = draw(st.integers(classes + 2, 60))
    sizes = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    groups = np.repeat(np.arange(count), sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    per_patient, per_image = rng.integers(0, classes, count)[groups], rng.integers(0, classes, len(groups))
    labels = per_patient if draw(st.booleans()) else per_image
    order = rng.permutation(len(groups))
    return torch.from_numpy(labels[order]), torch.from_numpy(groups[order])


@settings(max_examples=300)
@given(cohorts(), st.integers(0, 9), st.sampled_from([2, 3]))
def test_no_patient_is_on_two_sides(cohort: tuple[torch.Tensor, torch.Tensor], seed: int, parts: int) -> None:
    labels, groups = cohort
    pieces = split(labels, seed, parts, "x", groups)
    assert torch.cat(pieces).sort().values.tolist() == list(range(len(labels)))
    sides = [set(groups[piece].tolist()) for piece in pieces]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert set(labels[pieces[0]].tolist()) == set(labels.tolist())
    assert all(len(piece) for piece in pieces)
    check_apart([groups[piece] for piece in pieces], "x")
    again = split(labels, seed, parts, "x", groups)
    assert all(torch.equal(a, b) for a, b in zip(pieces, again, strict=True))


@settings(max_examples=100)
@given(cohorts(), st.integers(0, 9))
def test_shares_are_met_to_a_patient(cohort: tuple[torch.Tensor, torch.Tensor], seed: int) -> None:
    """Each part within the largest patient of its share, where patients are many."""
    labels, groups = cohort
    assume(len(groups.unique()) >= 20)
    largest = int(groups.bincount().max())
    for piece, share in zip(split(labels, seed, 3, "x", groups), (0.7, 0.15, 0.15), strict=True):
        assert abs(len(piece) - share * len(labels)) <= 2 * largest


def test_stratified_over_many_patients() -> None:
    """300 patients of one to five images, one diagnosis each: the rare class keeps its share in every part."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(300), rng.integers(1, 6, 300))
    labels = (rng.random(300) < 0.2)[groups].astype(np.int64)
    for seed in range(5):
        for piece, share in zip(
            split(torch.from_numpy(labels), seed, 3, "x", torch.from_numpy(groups)), (0.7, 0.15, 0.15), strict=True
        ):
            assert len(piece) / len(labels) == pytest.approx(share, abs=0.01)
            assert labels[piece].mean() == pytest.approx(labels.mean(), abs=0.01)
    first, second = (split(torch.from_numpy(labels), s, 3, "x", torch.from_numpy(groups))[2] for s in (0, 1))
    assert not torch.equal(first, second)


def test_multilabel_patients() -> None:
    rng = np.random.default_rng(1)
    groups = torch.from_numpy(np.repeat(np.arange(80), 3))
    labels = torch.from_numpy((rng.random((240, 4)) < 0.3).astype(np.float32))
    pieces = split(labels, 0, 3, "x", groups)
    sides = [set(groups[piece].tolist()) for piece in pieces]
    assert sum(map(len, sides)) == 80
    for piece in pieces:
        assert (labels[piece].mean(0) - labels.mean(0)).abs().max() < 0.1


def test_too_few_patients_are_one_error() -> None:
    with pytest.raises(InputError, match=r"x: 2 patients \(or files\) are too few to split off val and test"):
        split(torch.arange(8) % 2, 0, 3, "x", torch.arange(8) // 4)
    # two classes that one patient each has must both be trained on
    with pytest.raises(InputError, match="3 patients"):
        split(torch.tensor([0, 0, 1, 1, 2, 2]), 0, 2, "x", torch.tensor([0, 0, 1, 1, 2, 2]))


@settings(max_examples=50)
@given(cohorts(), st.integers(0, 9))
def test_a_draw_is_nested_stratified_and_takes_many_patients(
    cohort: tuple[torch.Tensor, torch.Tensor], seed: int
) -> None:
    labels, groups = cohort
    order = stratified_order(labels, seed, groups)
    assert order.sort().values.tolist() == list(range(len(labels)))
    for c in labels.unique().tolist():
        members = [i for i in order.tolist() if labels[i] == c]
        seen: dict[int, int] = {}
        turns = []
        for group in groups[members].tolist():
            turns.append(seen.get(group, 0))
            seen[group] = turns[-1] + 1
        assert turns == sorted(turns)  # nobody gives a second image before all gave one
    for size in (len(labels) // 3, len(labels) // 2):
        counts = labels[order[:size]].bincount(minlength=int(labels.max()) + 1)
        if size >= len(counts):
            assert (counts - labels.bincount() / len(labels) * size).abs().max() <= len(counts)


def test_given_splits_that_share_a_patient_are_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rows = ["path,label,split,who"]
    for index in range(30):
        image.fromarray(np.full((4, 4), index * 8, np.uint8)).save(tmp_path / f"{index}.png")
        split_name = "test" if index >= 20 else "train"
        rows.append(f"{index}.png,{index % 2},{split_name},SECRET{index if index < 18 else index - 3}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"1 patients? .*more than one of train, val and test.*group='none'") as caught:
        load_data(tmp_path / "t.csv", group_column="who")
    assert "SECRET" not in str(caught.value)
    assert len(load_data(tmp_path / "t.csv", group_column="who", group="none").test) == 10
    assert len(load_data(tmp_path / "t.csv").test) == 10  # without the column nobody knows
