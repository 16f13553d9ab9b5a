"""Narrowing on the device: nothing strays to the host, whatever is measured, however few rows there are."""

import numpy as np
import torch

from molkd.cache_schema.fields import edge_spec, energy_spec, forces_spec, node_spec, v2v_spec
from molkd.cache_schema.fitting import fit_codebook
from molkd.cache_schema.signal import Signal
from molkd.pipeline.device_narrowing import BROKEN, narrow_on_device, sums_of
from molkd.pipeline.graphs.batch import make_batch
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.teacher_pass import Work

C = 8


def fitted(spec, encoding):
    rows = np.random.default_rng(0).normal(size=(50, *spec.shape)).astype(np.float32)
    return Signal(spec, encoding, fit_codebook(rows, spec, encoding, 1))


SIGNALS = {
    "energy": Signal(energy_spec(), "fp64"),
    "forces": Signal(forces_spec(), "fp32"),
    "node": Signal(node_spec(C), "fp16"),
    "v2v": fitted(v2v_spec(C), "pca:4"),
    "edge": fitted(edge_spec(C), "int8"),
}


def work_of(n_atoms):
    n = sum(n_atoms)
    batch = make_batch(
        atomic_numbers=np.ones(n, np.uint8),
        positions=np.arange(3 * n, dtype=np.float32).reshape(n, 3),
        n_atoms=np.array(n_atoms),
        cell=np.zeros((len(n_atoms), 3, 3), np.float32),
        pbc=np.zeros((len(n_atoms), 3), bool),
        tags=np.zeros(n, np.uint8),
        fixed=np.zeros(n, bool),
        rule=NeighborRule(cutoff=5.0),
        dtype=torch.float32,
    )
    return Work(np.arange(len(n_atoms)), batch, np.array(n_atoms))


def given(work, n_edges, device):
    rows = {"system": len(work.indices), "atom": int(work.n_atoms.sum()), "edge": n_edges}
    out = {name: torch.ones((rows[s.spec.axis], *s.spec.shape), device=device) for name, s in SIGNALS.items()}
    out["edge_index"] = torch.zeros((2, n_edges), dtype=torch.int64, device=device)
    return out | {"edge_shift": torch.zeros((n_edges, 3), device=device)}


def test_everything_stays_on_the_device():
    """A tensor on the host cannot go with the others on the stream that copies them there."""
    work = work_of([2, 3])
    narrowed = narrow_on_device(given(work, 4, "meta"), SIGNALS, work)
    assert {name for name, tensor in narrowed.items() if tensor.device.type != "meta"} == set()
    assert {"energy", "forces", "node", "v2v/scale", "edge_shift"} <= set(narrowed)


def test_a_batch_without_edges():
    work = work_of([1, 1])
    arrays = {k: v.numpy() for k, v in narrow_on_device(given(work, 0, "cpu"), SIGNALS, work).items()}
    assert arrays["edge"].shape == (0, C)
    assert not arrays[BROKEN].any()
    assert sums_of("edge", arrays).count == 0
    assert sums_of("node", arrays).count == 2
