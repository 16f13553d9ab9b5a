"""Share of the gap closed: hand-worked values, signs, undefined cases and the spread against simulation."""

import math

import numpy as np
import pytest

from molkd.pipeline.evaluation.gap import gap_closed
from molkd.pipeline.evaluation.seeds import SeedStat

SIMULATION_TOLERANCE = 0.05  # relative; first order against 20,000 draws


def _stat(*values):
    return SeedStat.of(values)


def test_seed_statistics_by_hand():
    assert _stat(1.0, 2.0, 3.0) == SeedStat(2.0, 1.0, 3)
    assert _stat(5.0) == SeedStat(5.0, None, 1)
    assert _stat(None, 4.0, None) == SeedStat(4.0, None, 1)
    assert _stat() == SeedStat(None, None, 0)
    assert math.isnan(_stat(1.0, math.nan).mean)


def test_paper_example_energy_on_oc20():
    # 440 -> 349 meV with a teacher of 286 meV is the paper's 59 %.
    gap = gap_closed(_stat(440.0), _stat(349.0), 286.0, larger_is_better=False)
    assert gap.percent == pytest.approx(59.09, abs=0.01)
    assert gap.spread is None
    assert "one seed" in gap.flag


def test_harm_is_negative_and_beating_the_teacher_exceeds_100():
    assert gap_closed(_stat(10, 10), _stat(11, 11), 0, larger_is_better=False).percent == pytest.approx(-10)
    assert gap_closed(_stat(10, 10), _stat(4, 4), 5, larger_is_better=False).percent == pytest.approx(120)


def test_scores_have_the_opposite_sign():
    up = gap_closed(_stat(0.90, 0.90), _stat(0.95, 0.95), 0.98, larger_is_better=True)
    assert up.percent == pytest.approx(62.5)
    assert gap_closed(_stat(0.9, 0.9), _stat(0.8, 0.8), 1.0, larger_is_better=True).percent == pytest.approx(
        -100
    )


@pytest.mark.parametrize(
    ("without", "with_kd", "teacher", "larger", "reason"),
    [
        (_stat(5, 5), _stat(4, 4), 5.0, False, "no gap"),
        (_stat(5, 5), _stat(4, 4), 6.0, False, "no gap"),
        (_stat(0.9, 0.9), _stat(0.95, 0.95), 0.8, True, "no gap"),
        (_stat(9, 11), _stat(9, 9), 9.0, False, "spread"),
        (_stat(9, 11), _stat(9, 9), None, False, "not measured"),
        (_stat(), _stat(9, 9), 9.0, False, "not measured"),
        (_stat(9, math.nan), _stat(9, 9), 1.0, False, "not finite"),
    ],
)
def test_undefined_is_none_and_says_why(without, with_kd, teacher, larger, reason):
    gap = gap_closed(without, with_kd, teacher, larger_is_better=larger)
    assert gap.percent is None
    assert gap.spread is None
    assert reason in gap.flag


def test_spread_by_hand():
    # w = 10 with spread 1, k = 6 with spread 2, t = 5: d = 5, 100/5 * sqrt(2^2 + (1/5)^2) = 40.2
    gap = gap_closed(SeedStat(10, 1, 3), SeedStat(6, 2, 3), 5.0, larger_is_better=False)
    assert gap.percent == pytest.approx(80)
    assert gap.spread == pytest.approx(20 * math.sqrt(4.04))
    assert gap.flag == ""


@pytest.mark.parametrize(
    ("k", "teacher", "larger"), [(6.0, 5.0, False), (11.0, 5.0, False), (12.0, 20.0, True)]
)
def test_spread_agrees_with_simulated_seeds(k, teacher, larger):
    w, spread_w, spread_k = 10.0, 0.1, 0.05
    rng = np.random.default_rng(0)
    ws, ks = rng.normal(w, spread_w, 20_000), rng.normal(k, spread_k, 20_000)
    simulated = np.std(100 * (ws - ks) / (ws - teacher), ddof=1)
    gap = gap_closed(SeedStat(w, spread_w, 3), SeedStat(k, spread_k, 3), teacher, larger_is_better=larger)
    assert gap.spread == pytest.approx(simulated, rel=SIMULATION_TOLERANCE)
