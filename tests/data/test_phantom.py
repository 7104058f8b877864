from __future__ import annotations

import numpy as np
import pytest

from tsynd.data.phantom import CLASS_NAMES, phantom
from tsynd.utils.errors import InputError


def test_layout() -> None:
    arrays = phantom(20, train=50, val=10, test=12)
    for split, count in (("train", 50), ("val", 10), ("test", 12)):
        assert arrays[f"{split}_images"].shape == (count, 20, 20)
        assert arrays[f"{split}_images"].dtype == np.uint8
        assert arrays[f"{split}_labels"].shape == (count, 1)
        assert arrays[f"{split}_labels"].max() < len(CLASS_NAMES)
    assert tuple(arrays["class_names"]) == CLASS_NAMES == tuple(sorted(CLASS_NAMES))


def test_an_image_depends_on_its_seed_split_and_index_only() -> None:
    short, long = phantom(train=300, val=20, test=20), phantom(train=520, val=9, test=20)
    np.testing.assert_array_equal(short["train_images"], long["train_images"][:300])
    np.testing.assert_array_equal(short["train_labels"], long["train_labels"][:300])
    np.testing.assert_array_equal(short["test_images"], long["test_images"])
    assert not np.array_equal(short["val_images"], short["test_images"])
    other = phantom(train=20, val=1, test=1, seed=1)
    assert not np.array_equal(other["train_images"], short["train_images"][:20])
    assert len(np.unique(long["train_images"].reshape(520, -1), axis=0)) == 520


def test_classes_are_uneven_and_images_use_the_range() -> None:
    arrays = phantom(train=2000, val=1, test=1)
    shares = np.bincount(arrays["train_labels"][:, 0]) / 2000
    np.testing.assert_allclose(shares, [0.22, 0.32, 0.20, 0.26], atol=0.04)
    means = arrays["train_images"].mean(axis=(1, 2))
    assert means.min() > 60
    assert means.max() < 240
    assert (arrays["train_images"].std(axis=(1, 2)) > 12).all()


def test_classes_differ_yet_overlap() -> None:
    # Dark area, the plainest feature: blasts have the largest nuclei, but no threshold separates them.
    arrays = phantom(train=1000, val=1, test=1)
    dark = (arrays["train_images"] < 110).mean(axis=(1, 2))
    labels = arrays["train_labels"][:, 0]
    blast, rest = dark[labels == 0], dark[labels != 0]
    assert np.median(blast) > np.median(rest)
    assert np.quantile(blast, 0.1) < np.quantile(rest, 0.9)


@pytest.mark.parametrize("change", [{"size": 15}, {"size": 257}, {"train": 0}, {"val": -1}, {"seed": -1}])
def test_bad_arguments(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        phantom(**change)
