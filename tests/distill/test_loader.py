"""The stream of batches against what the store holds: content, units, coverage, order, resuming, threads."""

import itertools
import shutil
import threading

import numpy as np
import pytest
import torch
from distill_cases import PAINN, SIGNALS, flip_a_bit, ids_of, read_systems, scale_of

from molkd.cache_schema.reader import Cache
from molkd.pipeline.distill.loader import CacheLoader, sample_to
from molkd.pipeline.errors import IntegrityError
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model

RULE = build_model(PAINN).neighbor_rule
SCALE = scale_of(read_systems())
ENERGY_NOISE = 1e-5  # eV; float32 of a normalised energy of up to 30 times 3 eV


def make_loader(store, *, subset=None, seed=0, batch_size=7, signals=SIGNALS, cache=None, pin=False):
    cache = cache or Cache.open(store)
    subset = np.ones(cache.n_systems, dtype=bool) if subset is None else subset
    return CacheLoader(
        cache,
        subset,
        RULE,
        SCALE,
        batch_size=batch_size,
        seed=seed,
        teacher="teacher",
        signals=signals,
        pin=pin,
    )


def take(loader, n):
    """The next n samples, with the thread ended behind them."""
    samples = iter(loader)
    try:
        return list(itertools.islice(samples, n))
    finally:
        samples.close()


def index_of(cache):
    return {row.tobytes(): k for k, row in enumerate(cache.ids)}


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("kd-prefetch")]


def assert_same(a, b):
    for x, y in zip((*a.batch, *a.targets[:3]), (*b.batch, *b.targets[:3]), strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
    assert a.targets.teacher.keys() == b.targets.teacher.keys()
    assert all(torch.equal(v, b.targets.teacher[k]) for k, v in a.targets.teacher.items())


def test_batches_hold_what_the_store_holds(mixed_store):
    cache = Cache.open(mixed_store)
    row = index_of(cache)
    loader = make_loader(mixed_store, cache=cache)
    for sample in take(loader, loader.batches_per_epoch):
        targets, ptr = sample.targets, sample.batch.atoms_ptr.tolist()
        for k, system in enumerate(ids_of(sample)):
            atoms = slice(ptr[k], ptr[k + 1])
            stored = cache[row[system]]
            assert torch.equal(targets.free[atoms], torch.from_numpy(~stored["fixed"]))
            assert torch.equal(sample.batch.fixed[atoms], torch.from_numpy(stored["fixed"]))
            np.testing.assert_array_equal(targets.teacher["node"][atoms], stored["teacher/node"])
            np.testing.assert_array_equal(targets.teacher["v2v"][atoms], stored["teacher/v2v"])
            assert targets.energy[k].isnan().item() == np.isnan(stored["energy"]).item()
            np.testing.assert_allclose(
                targets.forces[atoms] * SCALE.forces_std, stored["forces"], rtol=1e-6, atol=1e-6
            )


def test_neighbors_follow_the_students_rule(mixed_store):
    (sample,) = take(make_loader(mixed_store), 1)
    sender, receiver = sample.batch.edge_index
    assert (sample.batch.system_idx[sender] == sample.batch.system_idx[receiver]).all()
    distance = (sample.batch.positions[sender] - sample.batch.positions[receiver]).norm(dim=1)
    assert distance.max() < PAINN["cutoff"]
    assert len(distance)


def test_targets_are_what_a_perfect_student_predicts(mixed_store):
    """A model that outputs the targets gives labels and teacher back in eV and eV/A."""
    cache = Cache.open(mixed_store)
    row = index_of(cache)
    for sample in take(make_loader(mixed_store, cache=cache), 3):
        indices = np.array([row[i] for i in ids_of(sample)])
        targets = sample.targets

        def perfect(batch, taps, *, forces=True, t=targets):
            return {k: t.teacher[k] for k in ("energy", "forces", "atomic_energies")}

        out = Potential(perfect, SCALE).predict(sample.batch)
        arrays = [cache.read([i], (), teacher="teacher", signals=SIGNALS) for i in indices]
        stored = {k: np.concatenate([a[f"teacher/{k}"] for a in arrays]) for k in SIGNALS}
        for name in ("energy", "atomic_energies"):
            np.testing.assert_allclose(out[name], stored[name], rtol=0, atol=ENERGY_NOISE)
        np.testing.assert_allclose(out["forces"], stored["forces"], rtol=1e-6)
        total = torch.zeros(len(indices), dtype=torch.float64)
        total.index_add_(0, sample.batch.system_idx, out["atomic_energies"])
        torch.testing.assert_close(total, out["energy"], rtol=0, atol=10 * ENERGY_NOISE)

        def label(batch, taps, *, forces=True, t=targets):
            atomic = torch.zeros(batch.n_atoms)
            return {"energy": t.energy, "forces": t.forces, "atomic_energies": atomic}

        energy = Potential(label, SCALE).predict(sample.batch)["energy"]
        np.testing.assert_allclose(energy, cache.energy[indices], rtol=0, atol=ENERGY_NOISE)


def test_energies_keep_their_digits_although_batches_are_float32(store):
    """Total energies of hundreds of eV become small numbers before they are narrowed, not after."""
    (sample,) = take(make_loader(store), 1)
    assert sample.targets.energy.abs().max() < 30
    assert Cache.open(store).energy.min() < -300


def test_every_epoch_visits_each_system_of_the_subset_once(store):
    cache = Cache.open(store)
    subset = np.arange(cache.n_systems) % 3 > 0
    loader = make_loader(store, cache=cache, subset=subset)
    expected = sorted(row.tobytes() for row in cache.ids[subset])
    n = loader.batches_per_epoch
    assert n == -(-len(expected) // 7)
    samples = take(loader, 2 * n)
    first, second = ([i for s in part for i in ids_of(s)] for part in (samples[:n], samples[n:]))
    assert sorted(first) == sorted(second) == expected
    assert first != second


def test_the_seed_decides_the_order(store):
    for a, b in zip(take(make_loader(store), 9), take(make_loader(store), 9), strict=True):
        assert_same(a, b)
    other = take(make_loader(store, seed=1), 1)[0]
    assert ids_of(other) != ids_of(take(make_loader(store), 1)[0])


@pytest.mark.parametrize("n_seen", [0, 1, 5, 7, 8, 14])  # an epoch has 7 batches
def test_a_continued_stream_goes_on_with_the_next_batch(store, n_seen):
    uninterrupted = take(make_loader(store), n_seen + 3)
    loader = make_loader(store)
    take(loader, n_seen)
    continued = make_loader(store)
    continued.load_state_dict(loader.state_dict())
    for a, b in zip(take(continued, 3), uninterrupted[n_seen:], strict=True):
        assert_same(a, b)


def test_what_was_prefetched_but_not_used_is_not_lost(store):
    loader = make_loader(store)
    samples = iter(loader)
    next(samples)
    assert loader.state_dict() == {"epoch": 0, "batch_in_epoch": 1}
    samples.close()
    assert_same(take(loader, 1)[0], take(make_loader(store), 2)[1])


def assert_third_fails(loader):
    samples = iter(loader)
    assert next(samples).batch.n_systems == next(samples).batch.n_systems == 7
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(samples)
    assert not prefetch_threads()


def test_errors_of_the_thread_reach_the_trainer(store, monkeypatch):
    loader = make_loader(store)
    make_sample, calls = loader.make_sample, itertools.count()

    def broken(arrays):
        if next(calls) == 2:
            raise ZeroDivisionError("in the thread")
        return make_sample(arrays)

    monkeypatch.setattr(loader, "make_sample", broken)
    assert_third_fails(loader)


@pytest.fixture
def for_a_gpu(monkeypatch):
    """Loaders that build batches in several threads; a copy stands for pinned memory."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr("molkd.pipeline.distill.loader.available_cores", lambda: 16)
    return lambda store: make_loader(store, pin=True)


def test_batches_that_several_threads_build_keep_their_order(store, for_a_gpu, monkeypatch):
    loader = for_a_gpu(store)
    make_sample, calls, second_is_made = loader.make_sample, itertools.count(), threading.Event()

    def overtaken(arrays):
        call = next(calls)
        if call == 0:
            assert second_is_made.wait(timeout=60)  # in vain where only one thread builds
        sample = make_sample(arrays)
        if call == 1:
            second_is_made.set()
        return sample

    monkeypatch.setattr(loader, "make_sample", overtaken)
    for made, expected in zip(take(loader, 10), take(make_loader(store), 10), strict=True):
        assert_same(sample_to(made, torch.device("cpu")), expected)
    assert not prefetch_threads()


def test_errors_of_one_of_several_threads_reach_the_trainer(store, for_a_gpu, monkeypatch):
    loader = for_a_gpu(store)
    make_sample = loader.make_sample
    third = take(make_loader(store), 3)[2].batch.positions

    def broken(arrays):
        sample = make_sample(arrays)
        if torch.equal(sample.batch.positions, third):
            raise ZeroDivisionError("in the thread")
        return sample

    monkeypatch.setattr(loader, "make_sample", broken)
    assert_third_fails(loader)


def test_damage_on_disk_reaches_the_trainer(store, tmp_path):
    copy = tmp_path / "damaged.kdcache"
    shutil.copytree(store, copy)
    flip_a_bit(copy, "teachers/teacher/node")
    with pytest.raises(IntegrityError, match=r"shard 0 of array .*node.* is damaged in chunk 0"):
        take(make_loader(copy), 1)


@pytest.mark.parametrize("n_taken", [0, 1, 9])
def test_closing_the_stream_ends_its_thread(store, n_taken):
    samples = iter(make_loader(store))
    for _ in range(n_taken):
        next(samples)
    assert len(prefetch_threads()) == (n_taken > 0)
    samples.close()
    assert not prefetch_threads()


def test_a_trainer_that_fails_ends_the_thread(store):
    samples = iter(make_loader(store))
    next(samples)
    with pytest.raises(RuntimeError):
        samples.throw(RuntimeError("in the step"))
    assert not prefetch_threads()


def test_without_a_teacher_only_labels_are_read(store):
    loader = CacheLoader(Cache.open(store), np.ones(48, dtype=bool), RULE, SCALE, batch_size=48, seed=0)
    (sample,) = take(loader, 1)
    assert sample.targets.teacher == {}
    assert sample.batch.n_systems == 48
