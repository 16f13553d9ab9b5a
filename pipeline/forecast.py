"""What a teacher pass will cost, from a short measured probe: disk, seconds, and whether it fits."""

import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.encoding import encoding_for, exact_encoding, is_fitted
from molkd.cache_schema.fields import ATOM_FIELDS, EDGE_INDEX, EDGE_SHIFT, N_EDGES, FieldSpec
from molkd.cache_schema.fitting import calibration_atoms
from molkd.cache_schema.layout import CHUNK_ROWS, choose_rows_per_shard
from molkd.pipeline.budget import Proposal, propose
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.data.system import System
from molkd.pipeline.device import synchronize
from molkd.pipeline.encodings import CHOOSE, choose_encoding, ladder, row_bytes
from molkd.pipeline.graphs.batch import batch_from_systems, to_device
from molkd.pipeline.teachers.interface import Teacher

_PROBE_SECONDS = 3.0
_PROBE_BYTES = 32 * 2**20
_SYSTEM_BYTES = 13 + 36 + 8 + 16 + 4 * 4 + 8 * 3  # a row of the systems' arrays, about


@dataclass(frozen=True)
class Forecast:
    """The price of stage one; sizes in bytes, times in seconds."""

    store: str
    teacher: str
    n_systems: int
    n_atoms: int  # estimated from the probe if the data are not yet a store
    encodings: dict[str, str]  # signal -> encoding
    bytes_per_atom: dict[str, float]  # structures and labels, then each signal
    alternatives: dict[str, dict[str, float]]  # signal of features -> encoding -> bytes an atom
    edges_per_atom: float  # of the signal on edges; 0 if none was asked for
    total_bytes: int
    free_bytes: int
    fits: bool
    teacher_systems_per_second: float
    graph_systems_per_second: float  # neighbour lists and batches, in one thread beside the teacher
    write_bytes_per_second: float
    seconds: float  # of teacher, graphs or writing on one device, whichever is slowest: they overlap
    proposal: Proposal | None = None  # where a budget was given

    def text(self) -> str:
        """Return the price in words and tables."""
        atoms_per_system = self.n_atoms / self.n_systems
        lines = [
            (
                f"{self.store}: {self.teacher} over {self.n_systems:,} systems, {self.n_atoms:,} atoms "
                f"({atoms_per_system:.1f} a system)"
            ),
            "",
            f"{'':<24} {'encoding':<10} {'bytes/atom':>10} {'in all':>10}   others, bytes/atom",
        ]
        for name, size in self.bytes_per_atom.items():
            others = ", ".join(f"{e} {b:.0f}" for e, b in self.alternatives.get(name, {}).items())
            lines.append(
                f"{name:<24} {self.encodings.get(name, ''):<10} {size:>10.1f} "
                f"{_size(size * self.n_atoms):>10}   {others}".rstrip()
            )
        verdict = "fits" if self.fits else "DOES NOT FIT"
        rate = self.teacher_systems_per_second
        lines += [
            f"{'total':<24} {'':<10} {self.total_bytes / self.n_atoms:>10.1f} {_size(self.total_bytes):>10}",
            "",
            f"disk      {_size(self.free_bytes)} free: {verdict}",
            f"teacher   {rate:.3g} systems/s",
            f"graphs    {self.graph_systems_per_second:.3g} systems/s, beside the teacher",
            (
                f"writing   {self.total_bytes / max(self.seconds, 1e-9) / 1e6:.3g} MB/s needed, "
                f"the disk takes {self.write_bytes_per_second / 1e6:.3g} MB/s"
            ),
            f"time      {_time(self.seconds)} on one device; n devices take a n-th",
        ]
        if self.proposal is not None:
            lines += ["", *_proposal_lines(self.proposal)]
        return "\n".join(lines)


def forecast(
    store: Path,
    teacher: Teacher,
    sample: Sequence[System],
    n_systems: int,
    encodings: Mapping[str, str],
    config: CacheConfig,
    *,
    new_store: bool,
    budget: int | None = None,
) -> Forecast:
    """Time teacher, graphs and disk briefly and scale up.

    Parameters
    ----------
    sample : systems drawn at random from the data
    n_systems : in the whole data
    encodings : signal -> encoding, as `asked_encodings`
    new_store : structures and labels have to be written too
    budget : bytes that the store may take; then what to store is proposed
    """
    atoms_per_system = float(np.mean([s.n_atoms for s in sample]))
    n_atoms = round(atoms_per_system * n_systems)
    most_atoms, _ = config.budget(teacher.device.type)
    probe = _probe(teacher, sample, tuple(encodings), max(1, int(most_atoms / atoms_per_system)))
    specs = {name: teacher.signals[name] for name in encodings}
    chosen = {
        name: choose_encoding(probe.features[name], specs[name], config.max_error or 0.0)
        if encoding == CHOOSE
        else encoding
        for name, encoding in encodings.items()
    }
    structures = (
        _SYSTEM_BYTES / atoms_per_system
        + sum(row_bytes(spec, exact_encoding(spec)) for spec in ATOM_FIELDS.values())
        if new_store
        else 0.0
    )
    rows = {"system": 1 / atoms_per_system, "atom": 1.0, "edge": probe.edges_per_atom}
    alternatives = {
        name: {e: _bytes_per_atom(spec, e, rows) for e in ladder(spec)}
        for name, spec in specs.items()
        if encoding_for(spec, CHOOSE) == CHOOSE
    }
    per_atom = ({"structures": structures} if new_store else {}) | {
        name: _bytes_per_atom(specs[name], e, rows) for name, e in chosen.items()
    }
    rows_per_shard = choose_rows_per_shard(np.resize([s.n_atoms for s in sample], n_systems))
    # Shards are filled up to whole chunks, by half of one on average.
    n_rows = n_atoms + -(-n_atoms // rows_per_shard) * CHUNK_ROWS // 2
    total = round(sum(per_atom.values()) * n_rows)
    n_fitted = calibration_atoms(n_atoms) / atoms_per_system if any(map(is_fitted, chosen.values())) else 0
    n_passed = n_systems + n_fitted  # systems that the teacher sees
    folder = next(p for p in [store, *store.absolute().parents] if p.is_dir())
    bandwidth = _write_bandwidth(folder)
    free = shutil.disk_usage(folder).free
    proposal = None
    if budget is not None:
        known = alternatives | {
            name: {e: per_atom[name]} for name, e in chosen.items() if name not in alternatives
        }
        for name, e in chosen.items():
            known[name] = {**known[name], e: per_atom[name]}
        sizes = {name: {e: b * n_atoms for e, b in table.items()} for name, table in known.items()}
        proposal = propose(specs, chosen, sizes, structures * n_atoms, budget)
    return Forecast(
        store=str(store),
        teacher=teacher.info.name,
        n_systems=n_systems,
        n_atoms=n_atoms,
        encodings=chosen,
        bytes_per_atom=per_atom,
        alternatives=alternatives,
        edges_per_atom=probe.edges_per_atom,
        total_bytes=total,
        free_bytes=free,
        fits=total < free,
        teacher_systems_per_second=probe.teacher_rate,
        graph_systems_per_second=probe.graph_rate,
        write_bytes_per_second=bandwidth,
        seconds=max(n_passed / probe.teacher_rate, n_passed / probe.graph_rate, total / bandwidth),
        proposal=proposal,
    )


def _proposal_lines(proposal: Proposal) -> list[str]:
    if not proposal.fits:
        return [
            f"Not even the least there is fits the budget: {_size(proposal.total_bytes)}; take fewer systems"
        ]
    left_out = f", without {', '.join(proposal.dropped)}" if proposal.dropped else ""
    return [f"Within the budget ({_size(proposal.total_bytes)}){left_out}:", f"  {proposal.flags}"]


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2g} h"


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
    features: dict[str, NDArray[np.float32]]  # finite rows of each signal


def _probe(teacher: Teacher, sample: Sequence[System], signals: tuple[str, ...], batch_size: int) -> _Probe:
    """Run and time the teacher, and the building of graphs, after one warm-up batch."""
    done, n_atoms, n_edges, computing, building = 0, 0, 0, 0.0, 0.0
    rows: dict[str, list[NDArray[np.float32]]] = {s: [] for s in signals}
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
            for s in signals:
                rows[s].append(out[s].float().cpu().numpy())
            computing += time.perf_counter() - moved
        if computing + building > _PROBE_SECONDS:
            break
    features = {s: np.concatenate(parts) for s, parts in rows.items()}
    return _Probe(
        done / computing,
        done / building,
        n_edges / n_atoms,
        {s: x[np.isfinite(x).reshape(len(x), -1).all(axis=1)] for s, x in features.items()},
    )


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
