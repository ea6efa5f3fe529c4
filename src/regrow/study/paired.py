"""Statistics of differences that are paired over seeds: intervals, tests, and how many seeds they need."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05
_POWER = 0.8
_RESAMPLES = 9999
# Beyond this many seeds the noncentral t and the normal distribution differ by far less than 1 %.
_MANY = 10_000


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (ddof 1) over seeds; no deviation for a single seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Paired:
    """Differences other − baseline over the seeds both have, with the paired t test of their mean.

    ``low`` and ``high`` are the 95 % t interval: None for a single seed, and where all differences are
    equal, because then there is no spread to estimate it from. ``p`` is two-sided and None for a single
    seed; it is the t test's, or the sign test's where all differences are equal.
    """

    differences: Mapping[int, float]
    mean: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def gains(self) -> int:
        """The number of seeds with a difference above 0."""
        return sum(difference > 0 for difference in self.differences.values())

    @property
    def losses(self) -> int:
        """The number of seeds with a difference below 0."""
        return sum(difference < 0 for difference in self.differences.values())

    @property
    def ties(self) -> int:
        """The number of seeds without a difference."""
        return self.n - self.gains - self.losses

    @property
    def verdict(self) -> str:
        """As :func:`verdict` of the p value alone, not corrected for other comparisons."""
        return verdict(self.mean, self.p)


def paired(baseline: Mapping[int, float], other: Mapping[int, float]) -> Paired:
    """Compare two {seed: value} over the seeds both have.

    Raises:
        ValueError: they share no seed, or a value is NaN or infinite.
    """
    seeds = sorted(baseline.keys() & other.keys())
    if not seeds:
        raise ValueError(
            f"no seed is in both: {sorted(baseline)} and {sorted(other)}. Run both with the same seeds."
        )
    differences = {seed: other[seed] - baseline[seed] for seed in seeds}
    if not all(math.isfinite(difference) for difference in differences.values()):
        raise ValueError(f"values to compare must be finite, got differences {differences}.")
    over_seeds = spread(list(differences.values()))
    mean, deviation = over_seeds.mean, over_seeds.deviation
    if deviation is None:
        return Paired(differences, mean, None, None, None)
    largest = max(abs(values[seed]) for values in (baseline, other) for seed in seeds)
    # Differences that should be equal differ in their last digits: 0.83 − 0.82 is not 0.82 − 0.81.
    if deviation <= 1e-12 * largest:
        signs = [difference > 0 for difference in differences.values() if difference != 0]
        return Paired(differences, mean, None, None, sign_test(sum(signs), len(signs) - sum(signs)))
    from scipy.special import stdtr  # as scipy.stats.t, at a quarter of its import time

    n = len(seeds)
    half = _half_width(deviation, n)
    p = 2 * float(stdtr(n - 1, -abs(mean) * math.sqrt(n) / deviation))
    return Paired(differences, mean, mean - half, mean + half, p)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t interval of the mean of one or more values; None for a single value, and for equal ones."""
    if len(values) < 2 or _equal(values):
        return None
    mean, half = statistics.fmean(values), _half_width(statistics.stdev(values), len(values))
    return mean - half, mean + half


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (ddof 1) of one or more values."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def verdict(mean: float, p: float | None) -> str:
    """ "gain" or "loss" by the sign of ``mean`` where ``p`` is below 5 %, else "no gain shown"."""
    if p is None or p >= LEVEL or mean == 0:
        return "no gain shown"
    return "gain" if mean > 0 else "loss"


def sign_test(gains: int, losses: int) -> float:
    """Two-sided p value of ``gains`` against ``losses``, ties left out; 1 where there is neither."""
    if gains + losses == 0:
        return 1.0
    from scipy.special import bdtr  # as scipy.stats.binomtest, at a quarter of its import time

    return min(1.0, 2 * float(bdtr(min(gains, losses), gains + losses, 0.5)))


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean of ``values``, bias-corrected and accelerated, with a fixed seed.

    Where that correction is not defined, it is a percentile interval. None for fewer than three values, or
    equal ones.
    """
    if len(values) < 3 or _equal(values):
        return None
    import warnings

    import numpy as np
    from scipy import stats

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                (np.array(values, dtype=float),),
                np.mean,
                n_resamples=_RESAMPLES,
                confidence_level=1 - LEVEL,
                method=method,
                random_state=np.random.default_rng(0),
            ).confidence_interval
        low, high = float(found.low), float(found.high)
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    return None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """``p_values`` of one family corrected by Holm's method; None stays None and is not counted.

    The smallest is multiplied by their number m, the next by m − 1, and so on; none becomes smaller than
    the one before it, or larger than 1.
    """
    corrected: list[float | None] = [None] * len(p_values)
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return corrected


def seeds_needed(differences: Sequence[float]) -> int | None:
    """The smallest number of paired seeds that would show such a difference with 80 % power.

    By the two-sided paired t test at 5 %, if the true mean and standard deviation were those of
    ``differences``. None for fewer than three, whose spread says next to nothing, for a mean of 0, and for
    equal differences.
    """
    if len(differences) < 3 or _equal(differences):
        return None
    size = abs(statistics.fmean(differences)) / statistics.stdev(differences)
    if size <= 1e-12:
        return None
    from scipy.special import ndtri

    # By the normal distribution fewer seeds are needed than by the t distribution.
    fewest = math.ceil(((float(ndtri(1 - LEVEL / 2)) + float(ndtri(_POWER))) / size) ** 2)
    if fewest > _MANY:
        return fewest
    return next(n for n in range(max(2, fewest), 2 * _MANY) if power(size, n) >= _POWER)


def power(size: float, n: int) -> float:
    """The probability that the two-sided paired t test at 5 % of ``n`` seeds shows a true difference.

    Args:
        size: the true mean difference in standard deviations of the differences.
        n: two or more.
    """
    from scipy import stats

    limit = float(stats.t.ppf(1 - LEVEL / 2, n - 1))
    shift = size * math.sqrt(n)
    below = float(stats.nct.cdf(-limit, n - 1, shift))
    # Far in its tail scipy's noncentral t gives NaN instead of 0.
    return float(stats.nct.sf(limit, n - 1, shift)) + (below if math.isfinite(below) else 0.0)


def _half_width(deviation: float, n: int) -> float:
    """Half the width of the 95 % t interval of the mean of ``n`` values with that standard deviation."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - LEVEL / 2)) * deviation / math.sqrt(n)


def _equal(values: Sequence[float]) -> bool:
    return statistics.stdev(values) <= 1e-12 * max(1.0, *map(abs, values))
