import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import node_spec
from molkd.cache_schema.layout import (
    Packing,
    check_name,
    choose_rows_per_shard,
    pack,
    signal_layout,
    stored_order,
)

M = 2**64


def mix(x: int) -> int:
    """The formula of docs/cache-format.md with Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % M
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % M
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % M
    return x ^ (x >> 31)


@given(
    st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=30, unique=True),
    st.integers(0, 2**63 - 1),
)
def test_order_follows_the_documented_formula_whatever_the_input_order(ids, seed):
    def key(one: bytes) -> tuple[int, bytes]:
        low, high = int.from_bytes(one[:8], "little"), int.from_bytes(one[8:], "little")
        return mix(mix(low ^ mix(seed)) ^ high), one

    for given_ids in (ids, ids[::-1]):
        order = stored_order(np.frombuffer(b"".join(given_ids), np.uint8).reshape(-1, 16), seed)
        assert [given_ids[k] for k in order] == sorted(ids, key=key)


def test_splitmix64_reference_value():
    assert mix(0) == 0xE220A8397B1DCDAF  # first output of splitmix64 seeded with 0, as published


@given(st.lists(st.integers(1, 2048), min_size=1, max_size=200), st.sampled_from([2048, 3072, 8192]))
def test_packing_equals_a_plain_loop(n_atoms, rows_per_shard):
    packing, places = pack(np.array(n_atoms), rows_per_shard)
    shard, used, count, per_shard = 0, 0, 0, []
    for k, n in enumerate(n_atoms):
        if used + n > rows_per_shard:
            per_shard.append(count)
            shard, used, count = shard + 1, 0, 0
        assert (places.shard[k], places.row[k]) == (shard, shard * rows_per_shard + used)
        assert places.slot[k] == shard * packing.systems_per_shard + count
        used, count = used + n, count + 1
    per_shard.append(count)
    assert packing == Packing(len(n_atoms), sum(n_atoms), shard + 1, rows_per_shard, max(per_shard))


@pytest.mark.parametrize(
    ("n_atoms", "rows"),
    [
        ([20] * 100, 4096),  # tiny: never below 4,096
        ([80] * 1000, 9216),  # 80,000 atoms / 8 = 10,000, down to a multiple of 1,024
        ([80] * 100_000, 65_536),  # large: the default
        ([5000, 3], 5120),  # the largest system has to fit
        ([70_000], 70_656),
    ],
)
def test_automatic_shard_size(n_atoms, rows):
    assert choose_rows_per_shard(np.array(n_atoms)) == rows


@pytest.mark.parametrize("asked", [1000, 1024, 0, -1024, 1 << 40])
def test_shard_size_asked_for_must_fit(asked):
    with pytest.raises(CacheError, match="multiple of 1024, at least 2048"):
        choose_rows_per_shard(np.array([1500]), asked)


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "a//b", "a/../b", "", ".hidden", "values", "a/values", "a b", "x" * 65]
)
def test_names_that_could_leave_the_store_are_refused(name):
    with pytest.raises(CacheError, match="names are letters"):
        check_name(name, "signal", parts=True)


def test_file_sizes_count_whole_chunks_and_the_index():
    layout = signal_layout("teachers/t/node", node_spec(4), "fp16", Packing(9, 2000, 1, 4096, 9))["values"]
    assert layout.file_bytes(1024) == 1024 * 8 + 4 * 16 + 4
    assert layout.file_bytes(1025) == 2048 * 8 + 4 * 16 + 4
    assert layout.file(12) == "data.zarr/teachers/t/node/values/c/12/0"
