"""A store of made-up systems and features of a given size, for the benchmarks of reading and writing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from molkd.cache_schema.codebook import Codebook
from molkd.cache_schema.fields import FieldSpec, node_spec, v2v_spec
from molkd.cache_schema.layout import SCALE
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.writer import Store, create_store

TEACHER = "made-up"
NODE, V2V = node_spec(256), v2v_spec(256)


def make_store(
    path: Path, n_systems: int, mean_atoms: int = 75, specs: Sequence[FieldSpec] = (NODE, V2V)
) -> Store:
    """Write structures, labels, and signals in int8, of random numbers; continues."""
    rng = np.random.default_rng(0)
    n_atoms = rng.integers(mean_atoms - 25, mean_atoms + 26, n_systems)
    store = create_store(
        path,
        ids=rng.integers(0, 256, (n_systems, 16), dtype=np.uint8),
        n_atoms=n_atoms,
        energy=rng.normal(size=n_systems),
        cell=rng.normal(size=(n_systems, 3, 3)),
        pbc=np.ones((n_systems, 3), dtype=bool),
        source=np.zeros(n_systems, dtype=np.int64),
        source_row=np.arange(n_systems),
        source_names=["made up"],
        dataset={"licence": "CC0-1.0"},
    )
    store.add_teacher(TEACHER, {"weights_sha256": "0" * 64})
    groups = [store.add_signal(TEACHER, spec, "int8", codebook(spec)) for spec in specs]
    for shard in store.missing_shards("atoms"):
        n = store.systems.rows_in_shard(shard)
        with store.shard_writer("atoms", shard) as writer:
            writer.write(
                {
                    "atomic_numbers": rng.integers(1, 90, n),
                    "positions": rng.normal(size=(n, 3)).astype(np.float32),
                    "forces": rng.normal(size=(n, 3)).astype(np.float32),
                    "tags": rng.integers(0, 3, n),
                    "fixed": rng.random(n) < 0.5,
                }
            )
    for spec, group in zip(specs, groups, strict=True):
        noise = rng.integers(-127, 128, (4096, *spec.shape), dtype=np.int8)
        for shard in store.missing_shards(group):
            with store.shard_writer(group, shard) as writer:
                n = store.systems.rows_in_shard(shard)
                while (rows := min(4096, n - writer.rows_written)) > 0:
                    scale = np.ones(rows, np.float16)
                    writer.write_narrowed({"values": noise[:rows], SCALE: scale}, {})
    finalize(store)
    return store


def codebook(spec: FieldSpec) -> Codebook:
    """Return a codebook of int8 as good as any."""
    n = spec.shape[-1]
    mean = None if spec.symmetry == "vector" else np.zeros(n, np.float32)
    return Codebook("int8", np.full(n, 0.01, np.float32), np.full(n, 8, np.uint8), mean, None, 1)
