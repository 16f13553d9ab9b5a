"""What a teacher pass will cost, from a short measured probe: disk, seconds, and whether it fits."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.codebook import pca_bytes
from molkd.cache_schema.encoding import encoding_for, exact_encoding, is_fitted
from molkd.cache_schema.fields import ATOM_FIELDS, EDGE_INDEX, EDGE_SHIFT, N_EDGES, FieldSpec
from molkd.cache_schema.fitting import calibration_atoms
from molkd.cache_schema.plan import SYSTEM_ARRAYS
from molkd.pipeline.budget import Proposal, propose
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.data.system import System
from molkd.pipeline.encodings import CHOOSE, choose_encoding, held_out_error, ladder, row_bytes
from molkd.pipeline.forecast_text import describe
from molkd.pipeline.planned_store import PlannedStore
from molkd.pipeline.probing import probe_teacher, write_bandwidth
from molkd.pipeline.teachers.interface import Teacher

_RECORD_BYTES, _CHANNEL_BYTES = 2000, 42  # of a commit record and the like: in any case, and for statistics
_SYSTEM_BYTES = sum(np.dtype(d).itemsize * int(np.prod(s)) for d, s, *_ in SYSTEM_ARRAYS.values())


@dataclass(frozen=True)
class Forecast:
    """The price of stage one; sizes in bytes, times in seconds."""

    store: str
    teacher: str
    n_systems: int
    n_atoms: int  # estimated from the probe if the data are not yet a store
    n_systems_to_do: int  # that lack a signal
    stored_bytes: int  # what the store takes already
    encodings: dict[str, str]  # signal -> encoding
    bytes_per_atom: dict[str, float]  # structures and labels, if they have to be written; then each signal
    bytes_to_write: dict[str, int]  # of the same, in all
    alternatives: dict[str, dict[str, float]]  # signal not yet stored -> encoding -> bytes an atom
    edges_per_atom: float  # of the signal on edges; 0 if none was asked for
    overhead_bytes: int  # shards filled up to whole chunks, codebooks, records
    total_bytes: int  # to write, with the overhead
    free_bytes: int
    fits: bool
    teacher_systems_per_second: float
    graph_systems_per_second: float  # neighbour lists and batches, in one thread beside the teacher
    write_bytes_per_second: float | None  # None: nothing can be written beside the store
    seconds: float  # of teacher, graphs or writing on one device, whichever is slowest: they overlap
    proposal: Proposal | None = None  # where a budget was given

    def text(self) -> str:
        """Return the price in words and tables."""
        return describe(self)


def forecast(
    target: PlannedStore,
    teacher: Teacher,
    sample: Sequence[System],
    encodings: Mapping[str, str],
    config: CacheConfig,
    *,
    budget: int | None = None,
) -> Forecast:
    """Time teacher, graphs and disk briefly and scale up to what the store lacks.

    Parameters
    ----------
    sample : systems drawn at random from the data
    encodings : signal -> encoding, as `PlannedStore.settle`
    budget : bytes that the store may take; then what to store is proposed
    """
    specs = {name: teacher.signals[name] for name in encodings}
    n_systems, n_atoms = int(target.n_systems.sum()), int(target.n_atoms.sum())
    free_to_choose = [
        name
        for name, spec in specs.items()
        if encoding_for(spec, CHOOSE) == CHOOSE and not target.is_stored(name)
    ]
    keep = [name for name in free_to_choose if budget is not None or encodings[name] == CHOOSE]
    probe = probe_teacher(teacher, sample, tuple(specs), keep, *config.budget(teacher.device.type))
    chosen = {
        name: choose_encoding(probe.features[name], specs[name], config.max_error or 0.0)
        if encoding == CHOOSE
        else encoding
        for name, encoding in encodings.items()
    }
    candidates = {
        name: dict.fromkeys([*(ladder(spec) if name in free_to_choose else ()), chosen[name]])
        for name, spec in specs.items()
    }
    rows = {"system": n_systems / n_atoms, "atom": 1.0, "edge": probe.edges_per_atom}
    per_atom = {name: {e: _bytes(specs[name], e, rows) for e in candidates[name]} for name in specs}
    sizes = {
        name: {e: _stored_bytes(target, specs[name], e, probe.edges_per_atom) for e in candidates[name]}
        for name in specs
    }
    to_do = {name: target.shards_to_do(name) for name in specs}
    n_atoms_to_do = {name: int(target.n_atoms[shards].sum()) for name, shards in to_do.items()}
    bytes_per_atom = {name: per_atom[name][e] for name, e in chosen.items()}
    bytes_to_write = {name: round(bytes_per_atom[name] * n) for name, n in n_atoms_to_do.items()}
    structures = _structures_bytes(target) if target.is_new else 0
    if target.is_new:
        size = _SYSTEM_BYTES * rows["system"] + _atom_bytes()
        bytes_per_atom = {"structures": size, **bytes_per_atom}
        bytes_to_write = {"structures": round(size * n_atoms), **bytes_to_write}
    total = round(structures + sum(sizes[name][e] for name, e in chosen.items()))

    shards = sorted(set[int]().union(*to_do.values()))
    n_systems_to_do = int(target.n_systems[shards].sum())
    n_passed = n_systems_to_do + _n_fitted(target, encodings, chosen)
    folder = next(p for p in target.path.resolve().parents if p.is_dir())
    speed = write_bandwidth(folder)
    free = shutil.disk_usage(target.path if target.path.is_dir() else folder).free
    seconds = [n_passed / probe.teacher_rate, n_passed / probe.graph_rate]
    if speed is not None:
        seconds.append(total / speed)
    proposal = None
    if budget is not None:
        proposal = propose(specs, chosen, sizes, target.n_bytes + structures, budget)
        proposal = replace(proposal, errors=_errors(probe.features, specs, proposal.encodings))
    return Forecast(
        store=str(target.path),
        teacher=teacher.info.name,
        n_systems=n_systems,
        n_atoms=n_atoms,
        n_systems_to_do=n_systems_to_do,
        stored_bytes=target.n_bytes,
        encodings=chosen,
        bytes_per_atom=bytes_per_atom,
        bytes_to_write=bytes_to_write,
        alternatives={name: per_atom[name] for name in free_to_choose},
        edges_per_atom=probe.edges_per_atom,
        overhead_bytes=max(total - sum(bytes_to_write.values()), 0),
        total_bytes=total,
        free_bytes=free,
        fits=total < free,
        teacher_systems_per_second=probe.teacher_rate,
        graph_systems_per_second=probe.graph_rate,
        write_bytes_per_second=speed,
        seconds=max(seconds),
        proposal=proposal,
    )


def _n_fitted(target: PlannedStore, encodings: Mapping[str, str], chosen: Mapping[str, str]) -> float:
    """Return about how many systems the teacher sees once more because a codebook is fitted to them."""
    known = {name: signal.encoding for name, signal in target.declared.items()}
    if not any(known.get(s) != e and (encodings[s] == CHOOSE or is_fitted(e)) for s, e in chosen.items()):
        return 0.0
    n_atoms = int(target.n_atoms.sum())
    return calibration_atoms(n_atoms) * float(target.n_systems.sum()) / n_atoms


def _errors(
    features: Mapping[str, NDArray[np.float32]], specs: Mapping[str, FieldSpec], encodings: Mapping[str, str]
) -> dict[str, float | None]:
    """Return the relative errors of encodings on the half of the rows that they are not fitted to."""
    errors = {
        name: held_out_error(values, specs[name], encodings[name], len(values) // 2)
        for name, values in features.items()
        if name in encodings
    }
    return {s: None if math.isinf(error) else error for s, error in errors.items() if not math.isnan(error)}


def _bytes(spec: FieldSpec, encoding: str, rows: Mapping[str, float]) -> float:
    """Return the bytes of a signal with so many rows on each axis; on edges, also of which edges they are."""
    size = row_bytes(spec, encoding) * rows[spec.axis]
    if spec.axis == "edge":
        size += sum(row_bytes(f, exact_encoding(f)) * rows[f.axis] for f in (EDGE_INDEX, EDGE_SHIFT, N_EDGES))
    return float(size)


def _stored_bytes(target: PlannedStore, spec: FieldSpec, encoding: str, edges_per_atom: float) -> float:
    """Return what the shards that lack a signal will take: rows, fill, codebook and records."""
    shards = target.shards_to_do(spec.name)
    if not shards:
        return 0.0
    n_channels = spec.shape[-1] if spec.shape else 0
    # A record for each shard; metadata and the manifest's entry are about one more.
    metadata = (len(shards) + 1) * (_RECORD_BYTES + _CHANNEL_BYTES * n_channels)
    n_vectors = (
        2 if encoding == "int8" else min(n_channels, pca_bytes(encoding)) if is_fitted(encoding) else 0
    )
    codebook = 4 * n_channels * n_vectors
    return _bytes(spec, encoding, target.rows(shards, edges_per_atom)) + metadata + codebook


def _structures_bytes(target: PlannedStore) -> float:
    shards = list(range(len(target.n_atoms)))
    rows = target.rows(shards, 0.0)["atom"]
    n_records = len(shards) + len(ATOM_FIELDS) + 1
    return _SYSTEM_BYTES * float(target.n_systems.sum()) + _atom_bytes() * rows + n_records * _RECORD_BYTES


def _atom_bytes() -> int:
    return sum(row_bytes(spec, exact_encoding(spec)) for spec in ATOM_FIELDS.values())
