"""Splits depend on content alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from molkd.pipeline.data.splits import split_mask
from molkd.pipeline.errors import ConfigError

IDS = arrays(np.uint8, st.tuples(st.integers(0, 30), st.just(16)))


@given(ids=IDS, more=IDS, fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_stable_under_additions_and_order(ids, more, fraction, seed):
    mask = split_mask(ids, fraction)
    np.testing.assert_array_equal(split_mask(np.concatenate([more, ids]), fraction)[len(more) :], mask)
    order = np.random.default_rng(seed).permutation(len(ids))
    np.testing.assert_array_equal(split_mask(ids[order], fraction), mask[order])


@given(ids=IDS, fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_larger_fraction_contains_smaller(ids, fractions):
    smaller, larger = sorted(fractions)
    assert not (split_mask(ids, smaller) & ~split_mask(ids, larger)).any()


def test_fraction_and_independence():
    ids = np.random.default_rng(0).integers(0, 256, (20_000, 16), dtype=np.uint8)
    a, b = split_mask(ids, 0.1), split_mask(ids, 0.1, salt="test")
    sigma = np.sqrt(0.1 * 0.9 / 20_000)
    assert abs(a.mean() - 0.1) < 4 * sigma
    assert abs((a & b).mean() - 0.01) < 4 * np.sqrt(0.01 / 20_000)
    assert not split_mask(ids, 0.0).any()
    assert split_mask(ids, 1.0).all()


def test_definition():
    """The rule as the docstring tells it, so that another program can draw the same split."""
    ids = np.arange(48, dtype=np.uint8).reshape(3, 16)
    numbers = [
        int.from_bytes(hashlib.blake2b(b"val\0" + row.tobytes(), digest_size=8).digest(), "little")
        for row in ids
    ]
    for row, number in enumerate(numbers):
        assert split_mask(ids, min(number / 2**64 * 1.0001, 1))[row]
        assert not split_mask(ids, number / 2**64 * 0.9999)[row]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, np.nan])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        split_mask(np.zeros((1, 16), np.uint8), fraction)
