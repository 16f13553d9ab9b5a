"""What a teacher pass will cost, from a short measured probe: disk, seconds, and whether it fits."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molkd.cache_schema.encoding import encoding_for, exact_encoding, is_fitted
from molkd.cache_schema.fields import ATOM_FIELDS, EDGE_INDEX, EDGE_SHIFT, N_EDGES, FieldSpec
from molkd.cache_schema.fitting import calibration_atoms
from molkd.cache_schema.layout import CHUNK_ROWS, choose_rows_per_shard
from molkd.pipeline.budget import Proposal, propose
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.data.system import System
from molkd.pipeline.encodings import CHOOSE, choose_encoding, ladder, row_bytes
from molkd.pipeline.probing import probe_teacher, write_bandwidth
from molkd.pipeline.teachers.interface import Teacher

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
    write_bytes_per_second: float | None  # None: nothing can be written beside the store
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
        rate, speed = self.teacher_systems_per_second, self.write_bytes_per_second
        disk = f"the disk takes {speed / 1e6:.3g} MB/s" if speed else "the disk's speed is unknown"
        lines += [
            f"{'total':<24} {'':<10} {self.total_bytes / self.n_atoms:>10.1f} {_size(self.total_bytes):>10}",
            "",
            f"disk      {_size(self.free_bytes)} free: {verdict}",
            f"teacher   {rate:.3g} systems/s",
            f"graphs    {self.graph_systems_per_second:.3g} systems/s, beside the teacher",
            f"writing   {self.total_bytes / max(self.seconds, 1e-9) / 1e6:.3g} MB/s needed, {disk}",
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
    to_choose = [name for name, encoding in encodings.items() if encoding == CHOOSE]
    budgets = config.budget(teacher.device.type)
    probe = probe_teacher(teacher, sample, tuple(encodings), to_choose, *budgets)
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
    bandwidth = write_bandwidth(folder)
    free = shutil.disk_usage(folder).free
    seconds = [n_passed / probe.teacher_rate, n_passed / probe.graph_rate]
    if bandwidth is not None:
        seconds.append(total / bandwidth)
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
        seconds=max(seconds),
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
