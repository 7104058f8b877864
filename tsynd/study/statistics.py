"""Statistics over paired seeds, by SciPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tsynd.utils.errors import require

__all__ = ["mean_interval", "sign_flip_p", "smallest_p"]

_MOST_EXACT = 16  # pairs; 2¹⁶ sign patterns


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half the width of its t interval.

    Args:
        values: one per seed, taken to be independent and about normal.
        level: of confidence.

    Returns:
        (mean, half width); the half width is NaN for fewer than two values, both are for none.
    """
    if not values:
        return math.nan, math.nan
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    quantile = float(require("scipy.stats", "robustness").t.ppf((1 + level) / 2, len(values) - 1))
    return mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired permutation test: are the signs of the differences a coin's?

    All 2^n sign patterns are counted up to 16 pairs, a fixed random hundred thousand of them beyond.

    Args:
        differences: one per pair.

    Returns:
        p in (0, 1]; NaN for none.
    """
    if not differences:
        return math.nan
    if len(differences) == 1 or not np.any(differences):
        return 1.0
    result = require("scipy.stats", "robustness").permutation_test(
        (np.asarray(differences, dtype=float),),
        np.mean,
        permutation_type="samples",
        n_resamples=2**_MOST_EXACT if len(differences) <= _MOST_EXACT else 99_999,
        rng=np.random.default_rng(0),
    )
    return min(1.0, float(result.pvalue))


def smallest_p(pairs: int) -> float:
    """The smallest two-sided p-value that so many pairs can give."""
    return min(1.0, 2.0 ** (1 - pairs)) if pairs else math.nan
