"""Systems per second: what is counted, its spread, and the conditions beside it."""

import time

import numpy as np
import pytest
import torch

from molkd.pipeline.evaluation import throughput
from molkd.pipeline.evaluation.throughput import Conditions, Throughput, ThroughputMeter
from molkd.pipeline.graphs.batch import make_batch
from molkd.pipeline.graphs.neighbors import NeighborRule

CPU = torch.device("cpu")


def _batch(n_systems, n_atoms=3):
    total = n_systems * n_atoms
    return make_batch(
        atomic_numbers=np.full(total, 6, np.uint8),
        positions=np.arange(3.0 * total).reshape(total, 3),
        n_atoms=np.full(n_systems, n_atoms),
        cell=np.zeros((n_systems, 3, 3)),
        pbc=np.zeros((n_systems, 3), bool),
        tags=np.zeros(total, np.uint8),
        fixed=np.zeros(total, bool),
        rule=NeighborRule(cutoff=2.0),
    )


def test_median_and_quartiles_by_hand():
    conditions = Conditions("a", 1, 32, 10.0, "float32", "2.0")
    found = Throughput.of([50.0, 10.0, 30.0, 20.0, 40.0], conditions)
    assert (found.lower_quartile, found.median, found.upper_quartile, found.n_repeats) == (20, 30, 40, 5)
    assert Throughput.from_dict(found.to_dict()) == found


def test_full_batches_alone_are_counted(monkeypatch):
    seconds = iter([1.0, 2.0, 4.0, 8.0])  # of each full batch
    monkeypatch.setattr(throughput, "MIN_REPEATS", 3)
    monkeypatch.setattr(
        throughput, "timed", lambda call, _: (call(), next(seconds) if call() == 8 else 99.0)
    )  # fmt: skip
    meter = ThroughputMeter(lambda batch: batch.n_systems, CPU)
    assert [meter.predict(_batch(n)) for n in (8, 8, 8, 5)] == [8, 8, 8, 5]
    found = meter.result()
    assert (found.lower_quartile, found.median, found.upper_quartile) == (3, 4, 6)  # of 8, 4 and 2 a second
    assert found.n_repeats == 3
    wanted = Conditions(throughput.device_name(CPU), 1, 8, 3.0, "float32", torch.__version__)
    assert found.conditions == wanted
    assert wanted.device


def test_slow_models_are_not_repeated_for_long(monkeypatch):
    monkeypatch.setattr(throughput, "WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr(throughput, "REPEAT_SECONDS", 0.01)
    calls = []

    def slow(batch):
        calls.append(batch)
        time.sleep(0.02)

    meter = ThroughputMeter(slow, CPU)
    meter.predict(_batch(4))
    found = meter.result()
    assert len(calls) == 3  # one to warm up, one counted, one repeat
    assert found.median == pytest.approx(4 / 0.02, rel=0.5)
    assert found.n_repeats == 2
