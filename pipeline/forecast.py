"""What a teacher pass will cost, from a short measured probe: disk, seconds, and whether it fits."""

import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molkd.cache_schema.codebook import pca_bytes
from molkd.cache_schema.encoding import ENCODINGS, exact_encoding, is_fitted
from molkd.cache_schema.fields import ATOM_FIELDS, EDGE_INDEX, EDGE_SHIFT, N_EDGES, FieldSpec
from molkd.pipeline.data.system import System
from molkd.pipeline.device import synchronize
from molkd.pipeline.graphs.batch import batch_from_systems, to_device
from molkd.pipeline.teachers.interface import Teacher

_PROBE_SECONDS = 3.0
_PROBE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Forecast:
    """The price of stage one; sizes in bytes, times in seconds."""

    store: str
    teacher: str
    n_systems: int
    n_atoms: int  # estimated from the probe if the data are not yet a store
    bytes_per_atom: dict[str, float]  # structures and labels, then each signal
    edges_per_atom: float  # of the signal on edges; 0 if none was asked for
    total_bytes: int
    free_bytes: int
    fits: bool
    teacher_systems_per_second: float
    graph_systems_per_second: float  # neighbour lists and batches, in one thread beside the teacher
    write_bytes_per_second: float
    seconds: float  # of teacher, graphs or writing, whichever is slowest: they overlap


def forecast(
    store: Path,
    teacher: Teacher,
    sample: Sequence[System],
    n_systems: int,
    encodings: dict[str, str],
    batch_size: int,
    *,
    new_store: bool,
) -> Forecast:
    """Time teacher, graphs and disk briefly and scale up.

    Parameters
    ----------
    sample : systems drawn at random from the data
    n_systems : in the whole data
    encodings : signal -> encoding
    batch_size : systems a batch of the probe
    new_store : structures and labels have to be written too
    """
    atoms_per_system = float(np.mean([s.n_atoms for s in sample]))
    n_atoms = round(atoms_per_system * n_systems)
    probe = _probe(teacher, sample, tuple(encodings), batch_size)
    per_atom = (
        {"structures": float(sum(row_bytes(spec, exact_encoding(spec)) for spec in ATOM_FIELDS.values()))}
        if new_store
        else {}
    )
    rows_per_atom = {"system": 1 / atoms_per_system, "atom": 1.0, "edge": probe.edges_per_atom}
    for name, encoding in encodings.items():
        per_atom[name] = _bytes_per_atom(teacher.signals[name], encoding, rows_per_atom)
    total = round(sum(per_atom.values()) * n_atoms)
    folder = next(p for p in [store, *store.absolute().parents] if p.is_dir())
    bandwidth = _write_bandwidth(folder)
    free = shutil.disk_usage(folder).free
    return Forecast(
        store=str(store),
        teacher=teacher.info.name,
        n_systems=n_systems,
        n_atoms=n_atoms,
        bytes_per_atom=per_atom,
        edges_per_atom=probe.edges_per_atom,
        total_bytes=total,
        free_bytes=free,
        fits=total < free,
        teacher_systems_per_second=probe.teacher_rate,
        graph_systems_per_second=probe.graph_rate,
        write_bytes_per_second=bandwidth,
        seconds=max(n_systems / probe.teacher_rate, n_systems / probe.graph_rate, total / bandwidth),
    )


def row_bytes(spec: FieldSpec, encoding: str) -> int:
    """Return the bytes on disk of one row; of one in a fitted encoding, with its scale."""
    if is_fitted(encoding):
        channels = spec.shape[-1] if encoding == "int8" else pca_bytes(encoding)
        return int(np.prod(spec.shape[:-1], dtype=int)) * channels + np.dtype(np.float16).itemsize
    return int(np.dtype(ENCODINGS[encoding].dtype).itemsize * np.prod(spec.shape, dtype=int))


def _bytes_per_atom(spec: FieldSpec, encoding: str, rows: Mapping[str, float]) -> float:
    """Return the bytes of a signal with so many rows an atom, on edges also of what says which they are."""
    size = row_bytes(spec, encoding) * rows[spec.axis]
    if spec.axis == "edge":
        size += sum(row_bytes(f, exact_encoding(f)) * rows[f.axis] for f in (EDGE_INDEX, EDGE_SHIFT, N_EDGES))
    return float(size)


@dataclass(frozen=True)
class _Probe:
    """What a few batches of the sample told."""

    teacher_rate: float  # systems per second
    graph_rate: float
    edges_per_atom: float  # of the teacher's signal on edges; 0 if it was not asked for


def _probe(teacher: Teacher, sample: Sequence[System], signals: tuple[str, ...], batch_size: int) -> _Probe:
    """Run and time the teacher, and the building of graphs, after one warm-up batch."""
    done, n_atoms, n_edges, computing, building = 0, 0, 0, 0.0, 0.0
    starts = range(0, len(sample), batch_size)
    for k, start in enumerate([0, *starts]):
        part = sample[start : start + batch_size]
        began = time.perf_counter()
        batch = batch_from_systems(part, teacher.neighbor_rule, teacher.dtype)
        built = time.perf_counter()
        batch = to_device(batch, teacher.device)
        synchronize(teacher.device)
        moved = time.perf_counter()
        out = teacher.compute(batch, signals)
        synchronize(teacher.device)
        if k > 0:
            done += len(part)
            n_atoms += batch.n_atoms
            n_edges += out["edge_index"].shape[1] if "edge_index" in out else 0
            building += built - began
            computing += time.perf_counter() - moved
        if computing + building > _PROBE_SECONDS:
            break
    return _Probe(done / computing, done / building, n_edges / n_atoms)


def _write_bandwidth(folder: Path) -> float:
    """Bytes per second of one file written and forced to disk."""
    probe = folder / f".tmp-kd-probe-{uuid.uuid4().hex[:8]}"
    block = np.random.default_rng(0).bytes(2**20)
    try:
        began = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(_PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - began)
    finally:
        probe.unlink(missing_ok=True)
