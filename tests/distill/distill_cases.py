"""Small models, runs and stores that the tests of stage two share."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molkd.cache_schema.identity import system_id
from molkd.pipeline.config import CacheConfig, IngestConfig, TrainConfig, make_config
from molkd.pipeline.data.references import LabelScale, count_elements, fit_label_scale
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.data.system import System
from molkd.pipeline.distill import train
from molkd.pipeline.distill.loader import Sample
from molkd.pipeline.distill.losses import LossTerms, Weights
from molkd.pipeline.distill.step import TrainState
from molkd.pipeline.ingest import ingest
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model

COLL = Path(__file__).parents[1] / "data" / "coll_small.extxyz"  # 48 frames of 3 to 10 atoms, CC0
SIGNALS = ("energy", "forces", "atomic_energies", "node", "v2v")
CHANGES_BETWEEN_RUNS = {"seconds", "run", "test"}  # times, the folder's name, throughput
CLI = "from molkd.cli import main; main()"

PAINN = {
    "name": "painn",
    "hidden_channels": 16,
    "num_layers": 2,
    "num_rbf": 8,
    "cutoff": 4.0,
    "max_neighbors": 50,
    "direct_forces": True,
    "use_pbc": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "painn-direct": PAINN,
    "painn-gradient": PAINN | {"direct_forces": False},
    "schnet": {
        "name": "schnet",
        "hidden_channels": 16,
        "num_filters": 16,
        "num_interactions": 2,
        "num_gaussians": 8,
        "cutoff": 4.0,
        "use_pbc": True,
    },
}
TEACHER = PAINN | {"hidden_channels": 24, "num_layers": 3, "cutoff": 5.0}
# Ten atoms have nine neighbors: six of them are in the main graph, all in the others.
GEMNET: dict[str, Any] = {
    "name": "gemnet_oc",
    "num_spherical": 3,
    "num_radial": 8,
    "num_blocks": 2,
    "emb_size_atom": 12,
    "emb_size_edge": 16,
    **{
        f"emb_size_{what}": 8
        for what in ("trip_in", "trip_out", "quad_in", "quad_out", "aint_in", "aint_out")
    },
    **{f"emb_size_{what}": 4 for what in ("rbf", "cbf", "sbf")},
    "num_before_skip": 1,
    "num_after_skip": 1,
    "num_atom": 1,
    "num_output_afteratom": 1,
    "num_global_out_layers": 1,
    "cutoff": 5.0,
    "max_neighbors": 6,
    "max_neighbors_qint": 3,
    "max_neighbors_aint": 50,
}
GEMNET_TEACHER = GEMNET | {"emb_size_atom": 20, "emb_size_edge": 24}


def read_systems(path: Path = COLL) -> list[System]:
    source = open_source(path)
    try:
        return [source.read(i) for i in range(len(source))]
    finally:
        source.close()


def write_part(path: Path, begin: int, end: int) -> Path:
    """Write frames `begin` to `end` of the small set, text unchanged."""
    lines = COLL.read_text().splitlines(keepends=True)
    starts = np.concatenate([[0], np.cumsum([s.n_atoms + 2 for s in read_systems()])])
    path.write_text("".join(lines[starts[begin] : starts[end]]))
    return path


def scale_of(systems: list[System], mode: Any = "forces", references: Any = "fit") -> LabelScale:
    """The label scale of systems, from their own numbers."""
    n_atoms = np.array([s.n_atoms for s in systems])
    counts = count_elements(np.concatenate([s.atomic_numbers for s in systems]), n_atoms)
    forces = np.concatenate([s.forces[~s.fixed] for s in systems])
    rms = float(np.sqrt(np.nanmean(forces**2)))
    return fit_label_scale(counts, [s.energy for s in systems], rms, mode, references)


def save_teacher(path: Path, seed: int = 1, config: dict[str, Any] = TEACHER) -> Path:
    """A model with random weights, and energies that look like the labels'."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config)
    Potential(model, scale_of(read_systems()), {"model": config}).save(path)
    return path


def make_store(store: Path, *data: Path, drop_labels: tuple[Path, ...] = ()) -> Path:
    ingest(IngestConfig(data=data, store=store, drop_labels=drop_labels))
    return store


def add_teacher(store: Path, teacher: Path, **settings: Any) -> Path:
    from molkd.pipeline.caching import cache_teacher

    values = {"signals": SIGNALS, "name": "teacher", "encoding": "fp32", "batch_atoms": 100}
    cache_teacher(CacheConfig(store=store, teacher=str(teacher), **(values | settings)))
    return store


def train_config(store: Path, out: Path, **changes: Any) -> TrainConfig:
    """A run of seconds; `changes` are keys of TrainConfig, nested ones as mappings."""
    base = {
        "store": store,
        "out": out,
        "student": "test",
        "model": changes.pop("model", PAINN),
        "training": {
            "batch_size": 8,
            "lr": 5e-3,
            "ema_decay": 0.9,
            "normalization": "forces",
            "max_steps": 12,
            "schedule": {"warmup_steps": 5},
        },
        "device": "cpu",
        "log_every": 1,
    }
    return make_config(TrainConfig, base, changes)


def run_cli(*arguments: object, setup: str = "") -> subprocess.CompletedProcess[str]:
    """Run `kd ...` in a process of its own, some lines of Python before it."""
    return subprocess.run(
        [sys.executable, "-c", f"{setup}\n{CLI}", *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def read_metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(run: Path, name: str) -> list[float]:
    """The numbers of one column of metrics.csv; rows without one are left out."""
    return [float(row[name]) for row in read_metrics(run) if row[name] != ""]


def read_summary(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return content


def flip_a_bit(store: Path, array: str) -> None:
    """Damage the first shard of an array, where it holds values."""
    (shard,) = (p for p in (store / "data.zarr" / array).rglob("*") if p.is_file() and p.name != "zarr.json")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 0x10
    shard.write_bytes(content)


def ids_of(sample: Sample) -> list[bytes]:
    """Content ids of a batch, from its atoms alone."""
    batch = sample.batch
    ptr = batch.atoms_ptr.tolist()
    return [
        system_id(batch.atomic_numbers[b:e].numpy(), batch.positions[b:e].numpy(), cell.numpy(), pbc.numpy())
        for b, e, cell, pbc in zip(ptr[:-1], ptr[1:], batch.cell, batch.pbc, strict=True)
    ]


def before_step(monkeypatch: pytest.MonkeyPatch, n_done: int, act: Callable[[], object]) -> None:
    """Do something in this process when so many training steps are done."""
    step = train.train_step

    def counted(state: TrainState, *arguments: Any) -> LossTerms:
        if state.step == n_done:
            act()
        return step(state, *arguments)

    monkeypatch.setattr(train, "train_step", counted)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    """Send SIGTERM within a step, so that the run ends in good order behind it."""
    before_step(monkeypatch, n_steps - 1, lambda: signal.raise_signal(signal.SIGTERM))


def assert_same_run(run: Path, expected: Path) -> None:
    """Weights, optimiser, place in the data, metrics and results are bitwise the same."""
    states = [torch.load(r / "last.pt", weights_only=True) for r in (run, expected)]
    for state in states:
        del state["counters"]["seconds"]
    assert_bitwise(*states)
    assert (run / "best.safetensors").read_bytes() == (expected / "best.safetensors").read_bytes()
    rows = [[{**row, "seconds": ""} for row in read_metrics(r)] for r in (run, expected)]
    assert rows[0] == rows[1]
    summary, expected_summary = (
        {k: v for k, v in read_summary(r).items() if k not in CHANGES_BETWEEN_RUNS} for r in (run, expected)
    )
    assert summary == expected_summary
    assert not [p for p in run.iterdir() if p.name.startswith(".tmp")]


def assert_bitwise(a: Any, b: Any, where: str = "state") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_bitwise(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bitwise(x, y, f"{where}[{k}]")
    else:
        assert a == b, where


def spread_weights(
    weights: torch.Tensor, n_atoms: torch.Tensor, n_edges: torch.Tensor | None = None
) -> Weights:
    """Give the atoms and edges of each system its weight, (S,)."""
    edges = weights[:0] if n_edges is None else weights.repeat_interleave(n_edges)
    return Weights(weights, weights.repeat_interleave(n_atoms), edges)
