"""Weights by origin (Eqs. 9 to 11) and the make-up of batches, against numbers worked out by hand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molkd.pipeline.distill.mixing import Composition, batch_counts, origin_weights
from molkd.pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("counts", "ratios", "expected"),
    [
        ((24, 8), (0.5,), (8 / 7, 4 / 7)),  # r = 1/4: 1 / (3/4 + 1/8)
        ((24, 8), (1.0,), (1.0, 1.0)),
        ((24, 8), (0.0,), (4 / 3, 0.0)),
        ((10, 30), (3.0,), (0.4, 1.2)),  # r = 3/4: 1 / (1/4 + 9/4)
        ((16, 8, 8), (2.0, 0.5), (8 / 9, 16 / 9, 4 / 9)),  # 1 / (1/2 + 1/2 + 1/8)
    ],
)
def test_weights_of_the_equations(counts, ratios, expected):
    assert origin_weights(counts, ratios) == pytest.approx(expected)


@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1e3)), min_size=1, max_size=4),
)
def test_the_mean_weight_is_one_and_ratios_are_kept(n_main, extra):
    counts, ratios = [n_main, *(n for n, _ in extra)], [k for _, k in extra]
    weights = origin_weights(counts, ratios)
    assert sum(n * w for n, w in zip(counts, weights, strict=True)) / sum(counts) == pytest.approx(1)
    assert weights[1:] == pytest.approx([k * weights[0] for k in ratios])


def test_with_the_ratio_of_origins_in_place_of_the_share_the_mean_would_not_be_one():
    """8 synthetic and 24 others, k = 1/2: the ratio is 1/3, and the equations with it give 1.2 and 0.6."""
    ratio = 8 / 24
    of_main = 1 / (1 - ratio + 0.5 * ratio)
    assert (24 * of_main + 8 * 0.5 * of_main) / 32 == pytest.approx(1.05)
    assert origin_weights((24, 8), (0.5,))[0] == pytest.approx(1.142857, abs=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "shares", "expected"),
    [
        (32, [0.25], (24, 8)),
        (8, [0.3], (6, 2)),
        (10, [0.25], (7, 3)),  # halves up
        (32, [0.001], (31, 1)),  # never none
        (32, [0.25, 0.1], (21, 8, 3)),
    ],
)
def test_shares_become_whole_systems(batch_size, shares, expected):
    assert batch_counts(batch_size, shares) == expected


@pytest.mark.parametrize(("batch_size", "shares"), [(1, [0.1]), (8, [0.5, 0.5]), (3, [0.9])])
def test_the_main_store_is_never_left_out(batch_size, shares):
    with pytest.raises(ConfigError, match=r"leaves none for the main store; lower --mix-share"):
        batch_counts(batch_size, shares)


def test_the_last_batch_of_an_epoch_is_smaller_in_proportion():
    composition = Composition(n_main=62, full=(24, 8, 2))
    assert composition.n_batches == 3
    made = [[composition.count(origin, batch) for batch in range(3)] for origin in range(3)]
    assert made == [[24, 24, 14], [8, 8, 5], [2, 2, 1]]  # 14/24 of 8 are 4.7, of 2 are 1.2


@given(st.integers(1, 60), st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(0, 4))
def test_places_are_the_sum_of_what_was_used_before(n_main, full, epoch):
    composition = Composition(n_main, tuple(full))
    n = composition.n_batches
    assert sum(composition.count(0, batch) for batch in range(n)) == n_main
    for origin in range(len(full)):
        used = [composition.count(origin, batch % n) for batch in range(n * (epoch + 2))]
        assert min(used) >= 1
        begins = [0, *itertools.accumulate(used)]
        for batch in range(n + 1):
            assert composition.place(origin, epoch, batch) == begins[epoch * n + batch]
