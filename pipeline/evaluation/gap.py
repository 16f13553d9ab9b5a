"""Share of the gap in accuracy between student and teacher that distillation closed."""

import math
from dataclasses import dataclass

from molkd.pipeline.evaluation.seeds import SeedStat

FORMULA = "gap closed = 100 × (student without KD − student with KD) / (student without KD − teacher)"

ONE_SEED = "one seed only: no spread is known"


@dataclass(frozen=True)
class GapClosed:
    """Percent of the gap closed: 100 reaches the teacher, 0 changes nothing, below 0 distillation harmed."""

    percent: float | None  # None: undefined, `flag` says why
    spread: float | None  # in percent, None: fewer than two seeds on either side
    flag: str = ""  # a remark for the reader; empty if there is nothing to remark


def gap_closed(
    without: SeedStat, with_kd: SeedStat, teacher: float | None, *, larger_is_better: bool
) -> GapClosed:
    """Return 100 (w - k) / (w - t) for w without KD, k with KD and t the teacher.

    The quotient is the same for errors and for scores, as numerator and denominator both change sign; the
    sign only decides what counts as a gap: t < w for an error, t > w for a score such as the force cosine.

    It is undefined, and flagged, if a value is missing, if the teacher is no better than the student without
    KD, or if the gap is smaller than the spread over seeds of the student without KD: a share of a gap that
    the seeds alone can open or close means nothing.

    Parameters
    ----------
    without, with_kd : mean and sample standard deviation over seeds
    teacher : one number, taken as exact
    larger_is_better : True for scores

    Notes
    -----
    The spread is the first-order propagation of both spreads through the quotient, the two groups of seeds
    being independent, with d = w - t::

        spread = 100 / |d| * sqrt(spread_k^2 + ((k - t) / d)^2 * spread_w^2)

    It is the spread expected of a single pair of runs, not the error of the mean.
    """
    w, k = without.mean, with_kd.mean
    if w is None or k is None or teacher is None:
        return GapClosed(None, None, "not measured for all three")
    if not (math.isfinite(w) and math.isfinite(k) and math.isfinite(teacher)):
        return GapClosed(None, None, "a value is not finite")
    difference = w - teacher
    gap = -difference if larger_is_better else difference
    if gap <= 0:
        return GapClosed(None, None, "no gap: the student without KD is as good as the teacher")
    if without.spread is not None and gap < without.spread:
        return GapClosed(None, None, "gap smaller than the spread over seeds of the student without KD")
    percent = 100 * (w - k) / difference
    if without.spread is None or with_kd.spread is None:
        return GapClosed(percent, None, ONE_SEED)
    slope_without = (k - teacher) / difference
    spread = 100 / gap * math.hypot(with_kd.spread, slope_without * without.spread)
    return GapClosed(percent, spread)
