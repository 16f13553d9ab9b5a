"""A small dataset with known values, and the calls that put it into a store; for tests and their scripts."""

import hashlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from molkd.cache_schema.fields import FieldSpec, edge_spec, energy_spec, node_spec, v2v_spec
from molkd.cache_schema.identity import system_id
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.writer import Store, create_store

TEACHER = "painn"
PROVENANCE = {"weights_sha256": "ab" * 32, "architecture": "PaiNN", "config": {"channels": 4}}
SIGNALS: list[tuple[FieldSpec, str]] = [
    (node_spec(4), "fp16"),
    (v2v_spec(3), "fp32"),
    (energy_spec(), "fp64"),
    (node_spec(2, "layer/U4"), "fp32"),
    (edge_spec(2, max_per_atom=3), "fp16"),
]


@dataclass
class Example:
    """Arrays in input order; rows of atoms one system after the other."""

    n_atoms: np.ndarray
    system: dict[str, np.ndarray]  # energy, cell, pbc
    atoms: dict[str, np.ndarray]  # as the group "atoms"
    signals: dict[str, np.ndarray]  # by signal name
    ids: np.ndarray
    edges: dict[str, np.ndarray] = field(default_factory=dict)  # values, index, shift a row an edge; n_edges

    @property
    def ptr(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.n_atoms)])

    def atom_rows(self, inputs) -> np.ndarray:
        """Rows of the given systems (input order), one system after the other."""
        return np.concatenate([np.arange(self.ptr[k], self.ptr[k + 1]) for k in inputs]).astype(np.int64)

    def edges_of(self, inputs) -> dict[str, np.ndarray]:
        """The arrays of an edge signal of the given systems (input order), one system after the other."""
        ends = np.cumsum(self.edges["n_edges"])
        n_edges = self.edges["n_edges"][inputs]
        rows = np.concatenate([np.arange(ends[k] - self.edges["n_edges"][k], ends[k]) for k in inputs])
        arrays = {name: values[rows] for name, values in self.edges.items() if name != "n_edges"}
        return arrays | {"n_edges": n_edges}

    def reordered(self, order) -> "Example":
        """The same systems in another input order."""
        rows = self.atom_rows(order)
        return Example(
            self.n_atoms[order],
            {k: v[order] for k, v in self.system.items()},
            {k: v[rows] for k, v in self.atoms.items()},
            {k: v[order if k == "energy" else rows] for k, v in self.signals.items()},
            self.ids[order],
            self.edges_of(order),
        )


def make_example(n_atoms, seed: int = 0) -> Example:
    n_atoms = np.asarray(n_atoms)
    random = np.random.default_rng(seed)
    S, N = len(n_atoms), int(n_atoms.sum())
    atoms = {
        "atomic_numbers": random.integers(1, 100, N).astype(np.uint8),
        "positions": random.normal(size=(N, 3)).astype(np.float32),
        "forces": random.normal(size=(N, 3)).astype(np.float32),
        "tags": random.integers(0, 3, N).astype(np.uint8),
        "fixed": random.random(N) < 0.2,
    }
    pbc = random.random((S, 3)) < 0.5
    system = {"energy": random.normal(size=S) * 10, "cell": random.normal(size=(S, 3, 3)), "pbc": pbc}
    system["energy"][::5] = np.nan  # labels that nobody knows
    atoms["forces"][: n_atoms[0]] = np.nan
    signals = {
        spec.name: random.normal(size=(S if spec.axis == "system" else N, *spec.shape)).astype(spec.dtype)
        for spec, _ in SIGNALS
        if spec.axis != "edge"
    }
    n_edges = random.integers(0, np.minimum(3, n_atoms - 1) * n_atoms + 1)
    E = int(n_edges.sum())
    edges = {
        "values": random.normal(size=(E, 2)).astype(np.float32),
        "index": random.integers(0, np.repeat(n_atoms, n_edges)[:, None], (E, 2)),
        "shift": random.integers(-300, 300, (E, 3)),
        "n_edges": n_edges,
    }
    ptr = np.concatenate([[0], np.cumsum(n_atoms)])
    ids = [
        system_id(
            atoms["atomic_numbers"][ptr[k] : ptr[k + 1]],
            atoms["positions"][ptr[k] : ptr[k + 1]],
            system["cell"][k],
            pbc[k],
        )
        for k in range(S)
    ]
    ids = np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(S, 16).copy()
    return Example(n_atoms, system, atoms, signals, ids, edges)


def create(path: Path, example: Example, rows_per_shard: int | None = 1024, seed: int = 3) -> Store:
    S = len(example.n_atoms)
    return create_store(
        path,
        ids=example.ids,
        n_atoms=example.n_atoms,
        **example.system,
        source=np.arange(S) % 2,
        source_row=np.arange(S) // 2,
        source_names=["a.extxyz", "b.extxyz"],
        dataset={"licence": "CC0-1.0", "note": "made up"},
        seed=seed,
        rows_per_shard=rows_per_shard,
    )


def shard_arrays(store: Store, example: Example, group: str, shard: int) -> dict[str, np.ndarray]:
    """What belongs into a shard, in stored order."""
    inputs = store.input_index[list(store.systems_of_shard(shard))]
    if group == "atoms":
        rows = example.atom_rows(inputs)
        return {name: values[rows] for name, values in example.atoms.items()}
    if group.endswith("/edge"):
        return example.edges_of(inputs)
    values = example.signals[group.split("/", 2)[2]]
    on_systems = len(values) == len(example.n_atoms) and group.endswith("energy")
    return {"values": values[inputs if on_systems else example.atom_rows(inputs)]}


def write_shard(store: Store, example: Example, group: str, shard: int, pieces: int = 1, bad=()) -> None:
    arrays = shard_arrays(store, example, group, shard)
    n_rows = {name: np.full(len(values), 1) for name, values in arrays.items()}
    if "n_edges" in arrays:  # cut between systems
        n_rows |= dict.fromkeys(("values", "index", "shift"), arrays["n_edges"])
    first = next(iter(n_rows.values()))
    cuts = np.linspace(0, len(first), pieces + 1).astype(int)
    with store.shard_writer(group, shard) as writer:
        for k, (begin, end) in enumerate(pairwise(cuts)):
            piece = {
                name: values[n_rows[name][:begin].sum() : n_rows[name][:end].sum()]
                for name, values in arrays.items()
            }
            writer.write(piece, bad if k == 0 else ())


def add_signals(store: Store) -> list[str]:
    store.add_teacher(TEACHER, PROVENANCE)
    return [store.add_signal(TEACHER, spec, encoding) for spec, encoding in SIGNALS]


def write_all(path: Path, example: Example, rows_per_shard: int | None = 1024, finish: bool = True) -> Store:
    """Create, write and finish a store; called again it continues."""
    store = create(path, example, rows_per_shard)
    for group in ["atoms", *add_signals(store)]:
        for shard in store.missing_shards(group):
            write_shard(store, example, group, shard, pieces=3)
    if finish:
        finalize(store)
    return store


def tree_digest(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file below a folder."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
