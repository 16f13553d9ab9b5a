"""Quantiles, the worst hundredth's share and the worst systems, by hand and against numpy."""

import heapq
from dataclasses import replace

import numpy as np
import pytest
from made_systems import collected, made_predictions, made_systems

from molkd.pipeline.evaluation.collect import Collector
from molkd.pipeline.evaluation.tail import QUANTILES, ErrorHistogram
from molkd.pipeline.evaluation.worst import WorstSystems

BIN = 1.4e-3  # relative width of a bin, 2**(1/512) - 1
SUM_TOLERANCE = 1e-12


def _tail(*parts):
    histogram = ErrorHistogram()
    for part in parts:
        histogram.add(np.array(part, dtype=float))
    return histogram.result()


def test_by_hand():
    # 200 errors 1 to 200: half are up to 100, 99 % up to 198; the worst two carry 199 + 200 of 20100.
    tail = _tail(np.arange(1, 201))
    assert tail.n == 200
    assert tail.quantiles == pytest.approx((100, 180, 190, 198), rel=BIN)
    assert tail.largest == 200
    assert tail.worst_share == pytest.approx(399 / 20100, rel=BIN)
    # of 50 equal errors half of one is the worst hundredth
    assert _tail(np.full(50, 0.3)).worst_share == pytest.approx(0.01)
    # one error of 1 among 99 zeros carries everything
    tail = _tail([0.0] * 99, [1.0])
    assert (tail.quantiles, tail.largest, tail.worst_share) == ((0, 0, 0, 0), 1.0, pytest.approx(1.0))


def test_nothing_and_only_zeros():
    assert _tail([]) is None
    tail = _tail([0.0, 0.0])
    assert (tail.quantiles, tail.largest, tail.worst_share) == ((0, 0, 0, 0), 0, 0)


@pytest.mark.parametrize("n", [1, 20, 999, 20_000])
def test_against_numpy(n):
    errors = np.abs(np.random.default_rng(n).standard_t(1.5, n))
    tail = _tail(*np.array_split(errors, 3))
    exact = np.quantile(errors, QUANTILES, method="inverted_cdf")
    np.testing.assert_allclose(tail.quantiles, exact, rtol=BIN)
    assert tail.largest == errors.max()
    descending = np.sort(errors)[::-1]
    whole, part = divmod(0.01 * n, 1)
    worst = descending[: int(whole)].sum() + part * descending[int(whole)]
    assert tail.worst_share == pytest.approx(worst / errors.sum(), rel=2 * BIN)


def test_errors_of_any_size_are_counted():
    tail = _tail([1e-12, 1e9])
    assert tail.quantiles == pytest.approx((1e-12, 1e9, 1e9, 1e9))
    assert tail.worst_share == pytest.approx(0.02)  # 2 % of the largest error


def test_order_and_workers_do_not_matter():
    errors = np.abs(np.random.default_rng(0).normal(size=1000))
    first, second = ErrorHistogram(), ErrorHistogram()
    first.add(errors[600:])
    second.add(errors[:600])
    first.merge(second)
    whole = _tail(errors)
    assert first.result().quantiles == pytest.approx(whole.quantiles, rel=SUM_TOLERANCE)
    assert first.result().worst_share == pytest.approx(whole.worst_share, rel=SUM_TOLERANCE)


def test_report_has_units():
    assert _tail([0.002] * 100).to_report("meV") == pytest.approx(
        {
            "p50_meV": 2, "p90_meV": 2, "p95_meV": 2, "p99_meV": 2, "max_meV": 2,
            "share_of_worst_1_percent": 1,
        }
    )  # fmt: skip


SYSTEMS = made_systems(100)


def _errors():
    """Return per system |dE| and the largest |dF| of a free labelled atom, NaN where there is none."""
    energy, forces = made_predictions(SYSTEMS)
    split = np.split(forces, np.cumsum([s.n_atoms for s in SYSTEMS])[:-1])
    lengths = [np.linalg.norm(f - s.forces, axis=1)[~s.fixed] for f, s in zip(split, SYSTEMS, strict=True)]
    largest = [a.max() if len(a) else np.nan for a in lengths]
    return np.abs(energy - [s.energy for s in SYSTEMS]), np.array(largest)


@pytest.mark.parametrize("batch_size", [1, 9, 100])
def test_tails_and_worst_systems_of_an_evaluation(batch_size):
    result = collected(Collector(0, (), WorstSystems(7)), SYSTEMS, batch_size)
    of_energy, of_forces = _errors()
    for by, errors, attribute in (
        ("energy", of_energy, "energy_error"),
        ("forces", of_forces, "force_error"),
    ):
        order = heapq.nlargest(7, np.flatnonzero(np.isfinite(errors)), key=lambda i: errors[i])
        assert [w.source for w in result.worst[by]] == [SYSTEMS[i].source for i in order]
        values = [abs(getattr(w, attribute)) for w in result.worst[by]]
        np.testing.assert_allclose(values, errors[order], rtol=SUM_TOLERANCE)
    assert result.energy_tail.largest == pytest.approx(np.nanmax(of_energy))
    assert result.energy_tail.n == np.isfinite(of_energy).sum()
    worst = result.worst["forces"][0]
    system = next(s for s in SYSTEMS if s.source == worst.source)
    assert worst.id == system.id.hex()
    assert not system.fixed[worst.atom]


def test_of_equal_errors_the_first_stay():
    heap = WorstSystems(2)
    same = [replace(s, energy=float(i)) for i, s in enumerate(SYSTEMS[:4])]
    for system in same:
        heap.add(system, system.energy + 1.0, system.forces)
    assert [k.system for k in heap.ranked("energy")] == same[:2]
