"""Speeds of models that take turns: who is called on what and when, and that known speeds are found."""

import itertools
import time

import numpy as np
import pytest
import torch
from made_systems import made_systems

from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation import turns
from molkd.pipeline.evaluation.turns import Contender, measure_in_turns, sample_systems
from molkd.pipeline.graphs.neighbors import NeighborRule

CPU = torch.device("cpu")
SYSTEMS = made_systems(40)


class Model:
    """Sleeps a given time for each system, and remembers what it was called with."""

    def __init__(self, name, seconds, calls=None):
        self.name, self.seconds = name, seconds
        self.calls = [] if calls is None else calls

    def predict(self, batch):
        self.calls.append((self.name, batch.n_systems, batch.n_atoms))
        time.sleep(self.seconds * batch.n_systems)
        return {"energy": torch.zeros(batch.n_systems), "forces": torch.zeros(batch.n_atoms, 3)}


def _contender(model, cutoff=2.0):
    return Contender(model.name, model.predict, NeighborRule(cutoff=cutoff), CPU)


def test_known_speeds(monkeypatch):
    monkeypatch.setattr(turns, "_TURN_SECONDS", 0.01)
    models = [Model("slow", 2e-3), Model("fast", 2e-4)]
    found = measure_in_turns([_contender(m) for m in models], SYSTEMS, batch_size=8, seconds=0.5)
    # Sleeping is never shorter than asked, so speeds are at most these; a busy machine makes them lower.
    assert 50 < found["slow"].model.median <= 500
    assert found["slow"].model.median < found["fast"].model.median <= 5000
    assert found["slow"].end_to_end.median <= 500
    for speed in found.values():
        assert speed.model.lower_quartile <= speed.model.median <= speed.model.upper_quartile
        assert speed.model.n_repeats >= turns.MIN_ROUNDS
    assert found["slow"].model.conditions == found["fast"].model.conditions
    assert found["slow"].model.conditions.batch_size == 8


def test_turns_alternate_on_the_same_systems(monkeypatch):
    monkeypatch.setattr(turns, "_TURN_SECONDS", 1e-9)  # a turn is one pass
    monkeypatch.setattr(turns, "MAX_ROUNDS", 6)
    calls, rounds = [], []
    models = [Model(name, 0.0, calls) for name in "abc"]
    marks = []

    def on_round(done, total):
        rounds.append((done, total))
        marks.append(len(calls))

    found = measure_in_turns([_contender(m) for m in models], SYSTEMS, batch_size=10, on_round=on_round)
    assert rounds == [(i, 6) for i in range(1, 7)]
    for i, (begin, end) in enumerate(itertools.pairwise(marks), start=1):
        names = [name for name, _ in itertools.groupby(calls[begin:end], key=lambda call: call[0])]
        assert names == [("abc" * 2)[(i + k) % 3] for k in range(3)]
        batches = [call[1:] for call in calls[begin:end]]
        assert batches[:8] == batches[8:16] == batches[16:]  # four batches alone, and four end to end
    sizes = [sum(s.n_atoms for s in SYSTEMS[i : i + 10]) for i in (0, 10, 20, 30)]
    assert [n_atoms for _, _, n_atoms in calls[marks[0] :][:4]] == sizes
    assert found["a"].model.conditions.atoms_per_system == pytest.approx(
        np.mean([s.n_atoms for s in SYSTEMS])
    )


def test_slow_models_go_over_fewer_batches(monkeypatch):
    monkeypatch.setattr(turns, "_TURN_SECONDS", 1e-9)  # a turn is one pass
    model = Model("slow", 5e-3)
    measure_in_turns([_contender(model)], SYSTEMS, batch_size=10, seconds=0.3)
    # 5 rounds of one batch, alone and end to end, are 0.5 s, and the warm-up is 0.3 s; of all four, 2 s
    assert sum(n for _, n, _ in model.calls) * 5e-3 < 1.0
    assert {n for _, n, _ in model.calls} == {10}


def test_few_systems_make_one_smaller_batch():
    model = Model("a", 1e-3)
    found = measure_in_turns([_contender(model)], SYSTEMS[:3], batch_size=32, seconds=0.1)
    assert found["a"].model.conditions.batch_size == 3


def test_what_cannot_be_compared():
    model = Model("a", 0.0)
    with pytest.raises(ConfigError, match="once"):
        measure_in_turns([_contender(model), _contender(model)], SYSTEMS)
    with pytest.raises(ConfigError, match="hold systems"):
        measure_in_turns([_contender(model)], [])


class _Source:
    def __init__(self, systems):
        self.systems = systems

    def __len__(self):
        return len(self.systems)

    def read(self, index):
        return self.systems[index]


def test_sample_is_of_all_sources_and_each_system_once():
    sources = [_Source(SYSTEMS[:5]), _Source(SYSTEMS[5:12]), _Source(SYSTEMS[12:])]
    everything = list(sample_systems(sources, 100))
    assert sorted(s.source for s in everything) == sorted(s.source for s in SYSTEMS)
    some = list(sample_systems(sources, 20))
    assert [s.source for s in some] == [s.source for s in everything[:20]]
    assert {s.source for s in some} & {s.source for s in SYSTEMS[:5]}
