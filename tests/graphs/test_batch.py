"""Batches joined are the batch that their systems make together, and split those they make apart."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from molkd.pipeline.data.system import System
from molkd.pipeline.graphs.batch import batch_from_systems, join_batches, split_batch
from molkd.pipeline.graphs.neighbors import NeighborRule

RULE = NeighborRule(4.0, 20)


def systems() -> list[System]:
    """Molecules and crystals of 1 to 6 atoms; an atom alone has no edges."""
    rng = np.random.default_rng(0)
    found = []
    for k in range(6):
        n = 1 + k
        found.append(
            System(
                atomic_numbers=rng.integers(1, 9, n),
                positions=3 * rng.random((n, 3)),
                cell=np.diag([4.0, 5.0, 6.0]) if k % 2 else np.zeros((3, 3)),
                pbc=np.full(3, bool(k % 2)),
                tags=rng.integers(0, 3, n),
                fixed=rng.random(n) < 0.5,
                energy=float("nan"),
                forces=np.full((n, 3), np.nan),
                source="test",
            )
        )
    return found


@pytest.mark.parametrize("cuts", [[3], [1, 2], [1, 2, 5], []])
def test_joined_batches_are_the_batch_of_all_their_systems(cuts):
    everything = systems()
    parts = [everything[b:e] for b, e in zip([0, *cuts], [*cuts, 6], strict=True)]
    joined = join_batches([batch_from_systems(part, RULE) for part in parts])
    expected = batch_from_systems(everything, RULE)
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(joined, name), value), name
        assert getattr(joined, name).dtype == value.dtype, name
    assert joined.edge_index.shape[1] > 50


@pytest.mark.parametrize("cuts", [[3], [1, 2], [1, 2, 5], []])
def test_parts_of_a_batch_are_the_batches_of_their_systems(cuts):
    everything, borders = systems(), [0, *cuts, 6]
    parts = split_batch(batch_from_systems(everything, RULE), borders)
    for part, border in zip(parts, pairwise(borders), strict=True):
        expected = batch_from_systems(everything[slice(*border)], RULE)
        for name, value in expected._asdict().items():
            assert torch.equal(getattr(part, name), value), name
            assert getattr(part, name).dtype == value.dtype, name
