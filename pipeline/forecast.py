"""What a teacher pass will cost, from a short measured probe: disk, seconds, and whether it fits."""

import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molkd.cache_schema.encoding import ENCODINGS, exact_encoding
from molkd.cache_schema.fields import ATOM_FIELDS, FieldSpec
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
    per_atom = (
        {"structures": float(sum(row_bytes(spec, exact_encoding(spec)) for spec in ATOM_FIELDS.values()))}
        if new_store
        else {}
    )
    for name, encoding in encodings.items():
        spec = teacher.signals[name]
        size = float(row_bytes(spec, encoding))
        per_atom[name] = size if spec.axis == "atom" else size / atoms_per_system
    total = round(sum(per_atom.values()) * n_atoms)
    rate, graph_rate = _rates(teacher, sample, tuple(encodings), batch_size)
    folder = next(p for p in [store, *store.absolute().parents] if p.is_dir())
    bandwidth = _write_bandwidth(folder)
    free = shutil.disk_usage(folder).free
    return Forecast(
        store=str(store),
        teacher=teacher.info.name,
        n_systems=n_systems,
        n_atoms=n_atoms,
        bytes_per_atom=per_atom,
        total_bytes=total,
        free_bytes=free,
        fits=total < free,
        teacher_systems_per_second=rate,
        graph_systems_per_second=graph_rate,
        write_bytes_per_second=bandwidth,
        seconds=max(n_systems / rate, n_systems / graph_rate, total / bandwidth),
    )


def row_bytes(spec: FieldSpec, encoding: str) -> int:
    """Return the bytes on disk of one atom's or one system's row."""
    return int(np.dtype(ENCODINGS[encoding].dtype).itemsize * np.prod(spec.shape, dtype=int))


def _rates(
    teacher: Teacher, sample: Sequence[System], signals: tuple[str, ...], batch_size: int
) -> tuple[float, float]:
    """Return systems per second of the teacher and of building graphs, after one warm-up batch."""
    done, computing, building = 0, 0.0, 0.0
    starts = range(0, len(sample), batch_size)
    for k, start in enumerate([0, *starts]):
        part = sample[start : start + batch_size]
        began = time.perf_counter()
        batch = batch_from_systems(part, teacher.neighbor_rule, teacher.dtype)
        built = time.perf_counter()
        batch = to_device(batch, teacher.device)
        synchronize(teacher.device)
        moved = time.perf_counter()
        teacher.compute(batch, signals)
        synchronize(teacher.device)
        if k > 0:
            done += len(part)
            building += built - began
            computing += time.perf_counter() - moved
        if computing + building > _PROBE_SECONDS:
            break
    return done / computing, done / building


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
