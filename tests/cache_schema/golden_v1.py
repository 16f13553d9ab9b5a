"""The stores tests/data/golden_v1*.kdcache: what they hold, and how they were made (format 1, molkd 0.1.0).

golden_v1_edges also has a signal on edges, golden_v1_fitted signals in int8 and pca:2. They are never made
again: later versions must read the bytes as they are. To see what the writer of today would make:
python golden_v1.py FOLDER [edges] [fitted]
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from molkd.cache_schema.codebook import Codebook
from molkd.cache_schema.fields import edge_spec, energy_spec, node_spec, v2v_spec
from molkd.cache_schema.identity import system_id
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.writer import Store, create_store

# Water, a hydrogen atom, and copper in its periodic cell; positions in Angstrom, labels in eV and eV/A.
NUMBERS = [[8, 1, 1], [1], [29]]
POSITIONS = [[[0, 0, 0], [0.75, 0.5, 0], [-0.75, 0.5, 0]], [[1, 2, 3]], [[0, 0, 0]]]
ENERGY = [-14.25, -13.6, float("nan")]
CELL = [np.zeros((3, 3)), np.zeros((3, 3)), [[0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0]]]
PBC = [[False] * 3, [False] * 3, [True] * 3]
PROVENANCE = {"weights_sha256": "0123456789abcdef" * 4, "architecture": "none", "licence": "CC0-1.0"}


# Sender, receiver, image of the sender, feature. Water: O-H bonds both ways; copper: neighboring cells.
EDGES = [
    [(1, 0, (0, 0, 0), 0.1), (2, 0, (0, 0, 0), 0.2), (0, 1, (0, 0, 0), 0.3), (0, 2, (0, 0, 0), 0.4)],
    [],
    [(0, 0, (1, 0, 0), 0.5), (0, 0, (-1, 0, 0), 0.6)],
]


def node(k: int, n: int) -> np.ndarray:
    """Features (n, 2) of system k: 0.1 and its number, so that half precision rounds one of them."""
    return np.tile(np.array([0.1, k], dtype=np.float32), (n, 1))


def coded(k: int, n: int) -> np.ndarray:
    """Features (n, 2) of system k whose codes in int8 are 127 and 10 k: see `BOOK`."""
    return np.tile(np.array([1 + 0.5 * 127, 0.25 * 10 * k], dtype=np.float32), (n, 1))


def rotated(k: int, n: int) -> np.ndarray:
    """Vectors (n, 3, 3) whose codes are (127, 7, -k) along x and zero along y and z."""
    along_x = np.array([-k, 127, 7], dtype=np.float32)
    return np.tile(np.stack([along_x, np.zeros(3), np.zeros(3)]).astype(np.float32), (n, 1, 1))


# The largest code, 127, asks for the scale 1, which is rounded up to 1025/1024.
BOOK = Codebook(
    "int8",
    np.array([0.5, 0.25], np.float32),
    np.full(2, 8, np.uint8),
    np.array([1.0, 0.0], np.float32),
    None,
    1,
)
ROTATION = Codebook(
    "pca:2",
    np.ones(3, np.float32),
    np.array([8, 4, 4], np.uint8),
    None,
    np.eye(3, dtype=np.float32)[[1, 2, 0]],
    1,
)


def make(path: Path, *, edges: bool = False, fitted: bool = False) -> Store:
    n_atoms = [len(z) for z in NUMBERS]
    ids = [system_id(*one) for one in zip(NUMBERS, POSITIONS, CELL, PBC, strict=True)]
    store = create_store(
        path,
        ids=np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(3, 16),
        n_atoms=n_atoms,
        energy=ENERGY,
        cell=CELL,
        pbc=PBC,
        source=[0, 0, 1],
        source_row=[0, 1, 0],
        source_names=["molecules.extxyz", "copper.extxyz"],
        dataset={"licence": "CC0-1.0"},
        rows_per_shard=1024,
    )
    store.add_teacher("golden", PROVENANCE)
    groups = {
        name: store.add_signal("golden", spec, encoding)
        for name, spec, encoding in (
            ("node", node_spec(2), "fp16"),
            ("v2v", v2v_spec(1), "fp32"),
            ("energy", energy_spec(), "fp64"),
        )
    }
    with store.shard_writer("atoms", 0) as writer:
        for k in store.input_index:
            n = n_atoms[k]
            writer.write(
                {
                    "atomic_numbers": np.array(NUMBERS[k], dtype=np.uint8),
                    "positions": np.array(POSITIONS[k], dtype=np.float32),
                    "forces": np.full((n, 3), np.nan if k == 2 else 0.5, dtype=np.float32),
                    "tags": np.full(n, k, dtype=np.uint8),
                    "fixed": np.arange(n) == 1,
                }
            )
    with (
        store.shard_writer(groups["node"], 0) as nodes,
        store.shard_writer(groups["v2v"], 0) as vectors,
        store.shard_writer(groups["energy"], 0) as energies,
    ):
        for i, k in enumerate(store.input_index):
            n = n_atoms[k]
            nodes.write({"values": node(k, n)}, bad_systems=[i] if k == 1 else ())
            vectors.write({"values": np.array(POSITIONS[k], dtype=np.float32)[:, :, None]})
            energies.write({"values": np.array([k + 0.1])})
    if edges:
        with store.shard_writer(
            store.add_signal("golden", edge_spec(1, max_per_atom=4), "fp16"), 0
        ) as writer:
            for k in store.input_index:
                n = len(EDGES[k])
                writer.write(
                    {
                        "values": np.array([e[3] for e in EDGES[k]], np.float32).reshape(n, 1),
                        "index": np.array([e[:2] for e in EDGES[k]], int).reshape(n, 2),
                        "shift": np.array([e[2] for e in EDGES[k]], int).reshape(n, 3),
                        "n_edges": np.array([n]),
                    }
                )
    if fitted:
        for spec, encoding, book, rows in (
            (node_spec(2, "layer/coded"), "int8", BOOK, coded),
            (replace(v2v_spec(3), name="layer/rotated"), "pca:2", ROTATION, rotated),
        ):
            with store.shard_writer(store.add_signal("golden", spec, encoding, book), 0) as writer:
                for k in store.input_index:
                    writer.write({"values": rows(k, n_atoms[k])})
    finalize(store)
    return store


if __name__ == "__main__":
    make(Path(sys.argv[1]), edges="edges" in sys.argv, fitted="fitted" in sys.argv)
