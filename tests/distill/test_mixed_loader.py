"""Batches of several stores: what they hold, from where, in which order, and that they can be continued."""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from distill_cases import COLL, PAINN, SIGNALS, add_teacher, ids_of, make_store, read_systems, scale_of

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm
from molkd.pipeline.distill.coded import CodedParts
from molkd.pipeline.distill.heads import make_heads
from molkd.pipeline.distill.loader import CacheLoader, sample_to
from molkd.pipeline.distill.losses import energy_loss
from molkd.pipeline.distill.mixed_loader import MixedLoader, join_samples
from molkd.pipeline.distill.objective import Objective
from molkd.pipeline.models.registry import build_model

RULE = build_model(PAINN).neighbor_rule
SCALE = scale_of(read_systems())
FIRST, SECOND, THIRD = range(20), range(20, 37), range(37, 48)  # stored indices of three origins


def loader_of(store, indices, batch_size, **changes):
    cache = Cache.open(store)
    subset = np.zeros(cache.n_systems, dtype=bool)
    subset[list(indices)] = True
    values = {"seed": 0, "teacher": "teacher", "signals": SIGNALS} | changes
    return CacheLoader(cache, subset, RULE, SCALE, batch_size=batch_size, **values)


def mixed(store, *, ratios=(0.5, 2.0), seed=0, **changes):
    """Batches of 6 + 3 + 2 systems; an epoch has 3 such batches and one of 2 + 1 + 1."""
    parts = ((FIRST, 6, seed), (SECOND, 3, seed + 1), (THIRD, 2, seed + 2))
    main, *extra = (loader_of(store, indices, n, seed=s, **changes) for indices, n, s in parts)
    return MixedLoader(main, extra, ratios)


def take(loader, n):
    samples = iter(loader)
    try:
        return list(itertools.islice(samples, n))
    finally:
        samples.close()


def tensors_of(sample):
    return (
        *sample.batch,
        *sample.targets[:3],
        *sample.targets.teacher.values(),
        *(sample.targets.weights or ()),
    )


def assert_same(a, b):
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.fixture(scope="module")
def origin_of(store):
    cache = Cache.open(store)
    names = {i: k for k, part in enumerate((FIRST, SECOND, THIRD)) for i in part}
    return {row.tobytes(): names[i] for i, row in enumerate(cache.ids)}


def test_every_batch_has_its_share_of_every_store(store, origin_of):
    loader = mixed(store)
    assert loader.batches_per_epoch == 4
    made = [[origin_of[i] for i in ids_of(s)] for s in take(loader, 9)]
    full, last = [0] * 6 + [1] * 3 + [2] * 2, [0] * 2 + [1] + [2]
    assert made == [full, full, full, last] * 2 + [full]


def test_every_store_is_gone_through_at_a_pace_of_its_own(store, origin_of):
    """An epoch uses each of 20 systems once; the others come back when all of their store have been used."""
    streams = [[], [], []]
    for sample in take(mixed(store), 4 * 17):
        for system in ids_of(sample):
            streams[origin_of[system]].append(system)
    for stream, n in zip(streams, (20, 17, 11), strict=True):
        passes = [stream[k : k + n] for k in range(0, len(stream) - n + 1, n)]
        assert len(passes) > 4
        assert all(len(set(one)) == n for one in passes)
        assert len({tuple(one) for one in passes}) == len(passes)  # reshuffled


def test_a_store_smaller_than_its_share_gives_its_systems_several_times(store):
    loader = MixedLoader(loader_of(store, FIRST, 6), [loader_of(store, [40, 41], 5)], (1.0,))
    counts = Counter(i for s in take(loader, 3) for i in ids_of(s)[6:])
    assert sorted(counts.values()) == [7, 8]


def test_the_seed_decides_the_order(store):
    for a, b in zip(take(mixed(store), 5), take(mixed(store), 5), strict=True):
        assert_same(a, b)
    assert ids_of(take(mixed(store, seed=7), 1)[0]) != ids_of(take(mixed(store), 1)[0])


@pytest.mark.parametrize("n_seen", [0, 1, 3, 4, 5, 8, 11, 23])  # an epoch has 4 batches
def test_a_continued_stream_goes_on_with_the_next_batch(store, n_seen):
    uninterrupted = take(mixed(store), n_seen + 6)
    loader = mixed(store)
    take(loader, n_seen)
    continued = mixed(store)
    continued.load_state_dict(loader.state_dict())
    for a, b in zip(take(continued, 6), uninterrupted[n_seen:], strict=True):
        assert_same(a, b)


def test_epochs_are_counted_like_those_of_one_store(store):
    """The state behind each batch is that of a loader of the main store alone."""
    loaders = [mixed(store), loader_of(store, FIRST, 6)]
    states = []
    for loader in loaders:
        samples = iter(loader)
        states.append([(next(samples), loader.state_dict())[1] for _ in range(10)])
        samples.close()
    assert states[0] == states[1]


def test_one_thread_reads_all_stores_and_ends_with_the_stream(store):
    samples = iter(mixed(store))
    next(samples)
    assert [t.name for t in threading.enumerate()].count("kd-prefetch") == 1
    samples.close()
    assert "kd-prefetch" not in [t.name for t in threading.enumerate()]


def test_weights_are_those_of_the_equations_for_the_batch_at_hand(store):
    """6 + 3 + 2 with k = 1/2, 2: 11 / (6 + 1.5 + 4); the last batch, 2 + 1 + 1: 4 / (2 + 0.5 + 2)."""
    made = [((6, 3, 2), 11 / 11.5)] * 3 + [((2, 1, 1), 4 / 4.5)]
    for sample, (n, w) in zip(take(mixed(store), 4), made, strict=True):
        expected = torch.tensor([w] * n[0] + [w / 2] * n[1] + [2 * w] * n[2])
        weights = sample.targets.weights
        torch.testing.assert_close(weights.systems, expected)
        torch.testing.assert_close(weights.atoms, expected[sample.batch.system_idx])


def test_gradients_are_those_of_the_weights(store):
    """Energies that are all too high: the gradient of the mean absolute error is weight over systems."""
    sample = take(mixed(store), 1)[0]
    predicted = (sample.targets.energy + 1).requires_grad_()
    energy_loss(predicted, sample.targets.energy, sample.targets.weights.systems).backward()
    w = 11 / 11.5
    assert predicted.grad.tolist() == pytest.approx([w / 11] * 6 + [w / 22] * 3 + [2 * w / 11] * 2)


def test_stores_that_count_alike_give_the_losses_of_the_joined_batch(store):
    """k = 1: terms and gradients are those of one loader that gives the same systems in one batch."""
    (sample,) = take(MixedLoader(loader_of(store, FIRST, 20), [loader_of(store, SECOND, 17)], (1.0,)), 1)
    (plain,) = take(loader_of(store, [*FIRST, *SECOND], 37), 1)
    assert sample.targets.weights is None
    assert sorted(ids_of(sample)) == sorted(ids_of(plain))
    (first, first_grads), (second, second_grads) = losses_of(sample, store), losses_of(plain, store)
    assert first == pytest.approx(second, rel=1e-5)
    for a, b in zip(first_grads, second_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("k", [0.25, 3.0])
def test_the_loss_is_the_weighted_sum_of_the_losses_of_each_store(store, k):
    """Every term's sum over a store counts w times: features and forces by atoms, energies by systems."""
    loader = MixedLoader(loader_of(store, FIRST, 20), [loader_of(store, SECOND, 17)], (k,))
    (sample,) = take(loader, 1)
    alone = [take(part, 1)[0] for part in loader.loaders]
    together, parts = losses_of(sample, store)[0], [losses_of(s, store)[0] for s in alone]
    w = 37 / (20 + 17 * k)
    for name in ("energy", "forces", "n2n", "v2v", "vanilla2"):
        n = [s.batch.n_systems if name == "energy" else s.batch.n_atoms for s in alone]
        expected = (w * n[0] * parts[0][name] + k * w * n[1] * parts[1][name]) / sum(n)
        assert together[name] == pytest.approx(expected, rel=1e-4), name


def losses_of(sample, store):
    """All terms and the gradients of a PaiNN with given random weights."""
    terms = tuple(KDTerm(name=name) for name in ("n2n", "v2v", "vanilla1", "vanilla2"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(PAINN)
        specs = {name: s.spec for name, s in Cache.open(store).teachers["teacher"].signals.items()}
        heads = make_heads(terms, model.signals, specs)
    objective = Objective(terms, {t.label: 1.0 for t in terms}, heads, 1.0, 100.0)
    total, parts = objective(model(sample.batch, objective.taps), sample.targets)
    total.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return {name: value.item() for name, value in parts.items()}, grads


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, teacher_file):
    """The same systems and signals with another encoding in each store."""
    folder = tmp_path_factory.mktemp("encoded")
    return [
        add_teacher(
            make_store(folder / f"{k}.kdcache", COLL),
            teacher_file,
            signals=("node", "v2v", "edge"),
            encoding=encoding,
        )
        for k, encoding in enumerate(("fp32", "int8", "pca:6"))
    ]


def test_every_store_is_decoded_with_its_own_codebook(encoded):
    """Coded rows stay coded until they are on the device, and become what each store's reader gives."""
    names = ("node", "v2v")
    parts = [loader_of(path, FIRST, 5, signals=names, pin=True) for path in encoded]
    plain = [loader_of(path, FIRST, 5, signals=names) for path in encoded]
    samples = [part.make_sample(next(part.read(part.plan(0)))) for part in parts]
    joined = join_samples([[s] for s in samples], (1.0, 1.0))
    assert isinstance(joined.targets.teacher["node"], CodedParts)
    decoded = sample_to(joined, torch.device("cpu")).targets.teacher
    expected = [part.make_sample(next(part.read(part.plan(0)))).targets.teacher for part in plain]
    for name in names:
        assert torch.equal(decoded[name], torch.cat([teacher[name] for teacher in expected]))
        assert not torch.equal(expected[0][name], expected[1][name])


def test_a_pinned_stream_becomes_the_same_batches_on_the_device(encoded, monkeypatch):
    """Coded parts and weights go through pinned memory; a copy stands for it where there is no CUDA."""
    n_pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: n_pinned.append(1) or tensor.clone())
    streams = []
    for pin in (False, True):
        main, other = (
            loader_of(path, part, 5, signals=("node", "v2v", "edge"), pin=pin)
            for path, part in zip(encoded[1:], (FIRST, SECOND), strict=True)
        )
        streams.append(take(MixedLoader(main, [other], (0.5,)), 9))
        assert bool(n_pinned) == pin
    for plain, pinned in zip(*streams, strict=True):
        assert_same(plain, sample_to(pinned, torch.device("cpu")))


def test_edges_of_the_teacher_stay_with_their_features(encoded):
    """Edges count on behind those of the store before, and weigh as much as their system."""
    loaders = [
        loader_of(path, part, 8, signals=("edge",))
        for path, part in zip(encoded, (FIRST, SECOND), strict=False)
    ]
    (sample,) = take(MixedLoader(loaders[0], loaders[1:], (3.0,)), 1)
    alone = [take(loader, 1)[0] for loader in loaders]
    assert torch.equal(sample.targets.teacher["edge"], torch.cat([s.targets.teacher["edge"] for s in alone]))
    assert torch.equal(
        sample.batch.edge_index[:, -1], alone[1].batch.edge_index[:, -1] + alone[0].batch.n_atoms
    )
    of_edge = sample.batch.system_idx[sample.batch.edge_index[1]]
    assert len(of_edge) == len(sample.targets.teacher["edge"])
    assert torch.equal(sample.targets.weights.edges, sample.targets.weights.systems[of_edge])
    assert set(sample.targets.weights.systems.tolist()) == {0.5, 1.5}
