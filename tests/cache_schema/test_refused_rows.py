"""Rows that a shard does not take: each has one clear error, and nothing is committed."""

import os

import numpy as np
import pytest
from cache_example import add_signals, shard_arrays

from molkd.cache_schema.encoding import ENCODINGS, encode
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.files import TMP_PREFIX
from molkd.cache_schema.writer import Store


def temporaries(store):
    return [p for p in store.path.rglob("*") if p.name.startswith(TMP_PREFIX)]


def test_too_few_rows_are_not_committed(store, example):
    arrays = shard_arrays(store, example, "atoms", 0)
    with (
        pytest.raises(CacheError, match="rows written; nothing is committed"),
        store.shard_writer("atoms", 0) as writer,
    ):
        writer.write({k: v[:-1] for k, v in arrays.items()})
    assert 0 in store.missing_shards("atoms")
    assert not temporaries(store)


def test_an_error_of_the_caller_commits_nothing(store, example):
    def stop_midway():
        with store.shard_writer("atoms", 0) as writer:
            writer.write(shard_arrays(store, example, "atoms", 0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_midway()
    assert 0 in store.missing_shards("atoms")
    assert not temporaries(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("tags"), "expected exactly atomic_numbers, positions, forces, tags, fixed"),
        (lambda a: a.update(tags=a["tags"][1:]), "arrays of unequal length"),
        (
            lambda a: a.update(positions=a["positions"][:, :2]),
            r"positions has rows of \(2,\), expected \(3,\)",
        ),
        (
            lambda a: a["positions"].__setitem__((3, 1), np.nan),
            "positions, shard 0: NaN in row 3, which is stored system",
        ),
        (
            lambda a: a["forces"].__setitem__((3, 1), -np.inf),
            "forces, shard 0: infinite value in row 3, channel 1",
        ),
        (
            lambda a: a.update(atomic_numbers=a["atomic_numbers"].astype(int) + 200),
            "values that are not uint8",
        ),
        (lambda a: a.update({k: np.concatenate([v, v]) for k, v in a.items()}), "rows given, the shard has"),
    ],
)
def test_rows_that_do_not_fit(store, example, change, message):
    arrays = {k: v.copy() for k, v in shard_arrays(store, example, "atoms", 0).items()}
    change(arrays)
    with pytest.raises(CacheError, match=message), store.shard_writer("atoms", 0) as writer:
        writer.write(arrays)
    assert not temporaries(store)


def test_half_precision_overflow_names_channel_value_and_remedy(store, example):
    group = add_signals(store)[0]
    arrays = shard_arrays(store, example, group, 0)
    arrays["values"][2, 3] = -70000.0
    with (
        pytest.raises(
            CacheError, match=r"-70000 in row 2, channel 3 is too large for its encoding.*--encoding fp32"
        ),
        store.shard_writer(group, 0) as writer,
    ):
        writer.write(arrays)
    assert 0 in store.missing_shards(group)


def test_half_precision_rounds_to_nearest():
    given = np.array([0.1, -65519.0, 1e-8, 5e-8, np.nan], dtype=np.float32)
    stored = encode(given, ENCODINGS["fp16"], "here")
    expected = [0.0999755859375, -65504.0, 0.0, 2**-24, np.nan]  # worked out by hand from binary16
    np.testing.assert_array_equal(stored.astype(np.float64), expected)


def test_non_finite_signals_are_refused_with_their_system(store, example):
    group = next(g for g in add_signals(store) if g.endswith("energy"))
    arrays = shard_arrays(store, example, group, 1)
    arrays["values"][-1] = np.nan
    system = store.systems_of_shard(1)[-1]
    message = f"NaN in row {len(arrays['values']) - 1}, which is stored system {system}"
    with pytest.raises(CacheError, match=message), store.shard_writer(group, 1) as writer:
        writer.write(arrays)


def test_no_such_shard_or_group(store):
    with pytest.raises(CacheError, match="no shard 99"):
        store.shard_writer("atoms", 99)
    with pytest.raises(CacheError, match="no group forces; it has atoms"):
        store.shard_writer("forces", 0)
    with pytest.raises(CacheError, match="opened for reading"):
        Store.open(store.path).shard_writer("atoms", 0)


def test_no_right_to_write(store, example, monkeypatch):
    def deny(*arguments):
        raise PermissionError(13, "Permission denied", str(store.path))

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(CacheError, match=r"cannot write .Permission denied.*check the folder's rights"):
        store.shard_writer("atoms", 0).__enter__()
