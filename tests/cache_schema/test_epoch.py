import numpy as np
import pytest
from cache_example import TEACHER
from hypothesis import given, settings
from hypothesis import strategies as st

from molkd.cache_schema.epoch import iterate_epoch, read_epoch
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.reader import Cache


class Sizes:
    """What planning an epoch needs of a cache."""

    path = "x.kdcache"

    def __init__(self, n_atoms):
        self.system_n_atoms = np.asarray(n_atoms, dtype=np.int32)
        self.n_systems = len(self.system_n_atoms)


@settings(deadline=None)
@given(
    n_atoms=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    batch_size=st.integers(1, 9),
    block_atoms=st.integers(1, 200),
    window_blocks=st.integers(1, 5),
    world_size=st.integers(1, 4),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_every_system_once_in_batches_of_the_right_size(
    n_atoms, batch_size, block_atoms, window_blocks, world_size, drop_last, data
):
    cache = Sizes(n_atoms)
    subset = np.array(data.draw(st.lists(st.booleans(), min_size=len(n_atoms), max_size=len(n_atoms))))
    if subset.sum() < world_size:
        subset[:] = True
    if subset.sum() < world_size or (batch_size == 1 and subset.sum() % world_size):
        return  # refused, see below
    plans = [
        iterate_epoch(
            cache,
            subset=subset,
            batch_size=batch_size,
            seed=1,
            epoch=2,
            block_atoms=block_atoms,
            window_blocks=window_blocks,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        for rank in range(world_size)
    ]
    assert len({len(plan) for plan in plans}) == 1  # ranks take the same number of steps
    used = np.concatenate([np.concatenate([*plan, []]) for plan in plans]).astype(int)
    assert len(used) == len(set(used.tolist()))
    assert set(used.tolist()) <= set(np.flatnonzero(subset).tolist())
    for plan in plans:
        sizes = [len(batch) for batch in plan]
        assert all(size == batch_size for size in (sizes if drop_last else sizes[:-2]))
        assert all(1 <= size <= batch_size for size in sizes)
        assert np.concatenate([*plan.windows, []]).tolist() == plan.order.tolist()
    if drop_last:
        assert subset.sum() - len(used) < world_size * batch_size
    else:
        assert len(used) == subset.sum()
    if world_size == 1 and not drop_last:
        assert len(plans[0]) == -(-subset.sum() // batch_size)


def test_order_is_fixed_by_seed_and_epoch_and_mixes():
    cache = Sizes(np.random.default_rng(0).integers(5, 100, 3000))

    def order(**changes):
        return iterate_epoch(cache, **{"batch_size": 32, "seed": 0, "epoch": 0, **changes}).order

    np.testing.assert_array_equal(order(), order())
    assert not np.array_equal(order(), order(epoch=1))
    assert not np.array_equal(order(), order(seed=1))
    # Positions before and after are uncorrelated: |r| < 4 / sqrt(3000).
    assert abs(np.corrcoef(order(block_atoms=500, window_blocks=4), np.arange(3000))[0, 1]) < 0.073


def test_batches_are_as_varied_as_a_full_shuffle():
    """Variance of batch means over that of independent draws, storage.md's measure; 1 is ideal."""
    random = np.random.default_rng(3)
    cache = Sizes(random.integers(40, 110, 6000))
    value = random.normal(size=6000)  # stored order is random, so neighbours are independent
    ratios = []
    for epoch in range(8):
        plan = iterate_epoch(
            cache, batch_size=32, seed=0, epoch=epoch, block_atoms=4096, window_blocks=16, drop_last=True
        )
        means = [value[batch].mean() for batch in plan]
        ratios.append(np.var(means) / (value.var() / 32))
    assert 0.9 < np.mean(ratios) < 1.1  # 8 x 187 batches: standard error 0.037


def test_companions_change_from_epoch_to_epoch():
    cache = Sizes(np.full(6000, 75))
    batch_of = []
    for epoch in range(2):
        number = np.empty(6000, dtype=int)
        for k, batch in enumerate(iterate_epoch(cache, batch_size=32, seed=0, epoch=epoch)):
            number[batch] = k
        batch_of.append(number)
    pairs = [np.flatnonzero(batch_of[0] == k) for k in range(187)]
    again = sum((batch_of[1][p][:, None] == batch_of[1][p]).sum() - len(p) for p in pairs)
    chance = 187 * 32 * 31 * 31 / 5999
    assert again / chance < 5  # blocks of 55 systems in windows of 32: measured 3.9 with smaller windows


@pytest.mark.parametrize("start_batch", [0, 1, 3, 4])
def test_reading_gives_the_planned_systems_and_resumes(store_path, start_batch):
    cache = Cache.open(store_path)
    settings_ = {"batch_size": 3, "seed": 5, "epoch": 1, "block_atoms": 400, "window_blocks": 2}
    fields, signals = ("positions", "energy", "atomic_numbers"), ("node", "energy", "edge", "v2v")
    plan = iterate_epoch(cache, **settings_)
    batches = list(
        read_epoch(cache, plan, fields=fields, teacher=TEACHER, signals=signals, start_batch=start_batch)
    )
    assert len(batches) == len(plan) - start_batch
    for (indices, arrays), planned in zip(batches, list(plan)[start_batch:], strict=True):
        assert indices.tolist() == planned.tolist()
        reference = cache.read(indices, fields, TEACHER, signals)
        assert arrays.keys() == reference.keys()
        for name, values in reference.items():
            assert arrays[name].dtype == values.dtype
            np.testing.assert_array_equal(arrays[name], values, err_msg=name)


def test_each_window_is_read_once(store_path, monkeypatch):
    cache = Cache.open(store_path)
    settings_ = {"batch_size": 2, "seed": 5, "epoch": 1, "block_atoms": 200, "window_blocks": 2}
    plan = iterate_epoch(cache, **settings_)
    assert len(plan.windows) > 2
    calls = []
    read = cache.read_arrays

    def spy(indices, arrays):
        if arrays:
            calls.append(indices)
        return read(indices, arrays)

    monkeypatch.setattr(cache, "read_arrays", spy)
    list(read_epoch(cache, plan, fields=("positions",)))
    assert [c.tolist() for c in calls] == [sorted(w.tolist()) for w in plan.windows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "sizes must be positive"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"subset": np.zeros(4, dtype=bool)}, "0 systems for 1 ranks"),
        ({"subset": np.arange(4)}, "expected bool"),
        ({"batch_size": 1, "world_size": 3}, "same number of batches"),
    ],
)
def test_senseless_settings(change, message):
    with pytest.raises(CacheError, match=message):
        iterate_epoch(Sizes([3, 4, 5, 6]), **{"batch_size": 2, "seed": 0, "epoch": 0, **change})
