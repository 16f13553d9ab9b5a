"""What the teacher gave, on its way into the files of a shard: checked, put into rows, written, committed."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.fields import EDGE_INDEX, EDGE_SHIFT, N_EDGES, FieldSpec
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.shard_writer import ShardWriter
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.scope import source_of
from molkd.pipeline.teacher_pass import Work
from molkd.pipeline.transfer import HostCopy

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


@dataclass
class Written:
    """What has been stored so far."""

    n_bytes: int = 0
    bad_systems: set[int] = field(default_factory=set)  # stored indices of those given up


def write(
    writers: Mapping[str, ShardWriter],
    specs: Mapping[str, FieldSpec],
    work: Work,
    copy: HostCopy,
    cache: Cache,
    written: Written,
    *,
    skip_bad: bool,
) -> None:
    """Wait for the values, check them and append them to the shard's files; not for the main thread.

    Parameters
    ----------
    writers : signal -> where it goes
    specs : of the teacher's signals, by name

    Raises
    ------
    TeacherError
        If a value is not finite and such systems are not to be skipped.
    CacheError
        If values do not fit the store, or the disk is full.
    """
    arrays = copy.wait()
    broken = _non_finite_systems(arrays, specs, work)
    if len(broken) and not skip_bad:
        raise TeacherError(
            f"{source_of(cache, int(broken[0]))}: the teacher gives non-finite numbers for this system; "
            "look at the structure, or quarantine such systems with --skip-bad"
        )
    for index in broken:
        log.warning("%s: non-finite teacher output, quarantined", source_of(cache, int(index)))
    written.bad_systems.update(broken.tolist())
    for name, writer in writers.items():
        is_on_edges = specs[name].axis == "edge"
        rows = edge_rows(arrays, name, work) if is_on_edges else {"values": arrays[name]}
        writer.write(rows, bad_systems=broken.tolist())


def commit(writers: Mapping[str, ShardWriter], written: Written) -> None:
    """Force the shard's files to disk and commit them; a writer that lacks rows commits nothing."""
    with ExitStack() as stack:
        for writer in writers.values():
            stack.push(writer)
    written.n_bytes += sum(writer.n_bytes for writer in writers.values())


def edge_rows(arrays: Arrays, name: str, work: Work) -> Arrays:
    """Return the rows of a signal on edges as a store takes them: by system, atoms counted within it.

    Parameters
    ----------
    arrays : signal `name` (E, C), ``edge_index`` (2, E) over the batch and ``edge_shift`` (E, 3)
    """
    index, shift, values = arrays["edge_index"].T, arrays["edge_shift"], arrays[name]
    system = _systems_of_atoms(work)[index[:, 1]]  # (E,)
    if (np.diff(system) < 0).any():
        order = np.argsort(system, kind="stable")
        system, index, shift, values = system[order], index[order], shift[order], values[order]
    first_atom = np.cumsum(work.n_atoms) - work.n_atoms  # (S,)
    return {
        "values": values,
        EDGE_INDEX.name: index - first_atom[system, None],
        EDGE_SHIFT.name: shift,
        N_EDGES.name: np.bincount(system, minlength=len(work.indices)),
    }


def _systems_of_atoms(work: Work) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(work.indices)), work.n_atoms)  # (N,)


def _non_finite_systems(arrays: Arrays, specs: Mapping[str, FieldSpec], work: Work) -> NDArray[np.int64]:
    """Return the stored indices of systems with a NaN or an infinity in any signal."""
    broken = np.zeros(len(work.indices), dtype=bool)
    for name, values in arrays.items():
        # A sum is finite unless a value is not (or the sum overflows, which float64 excludes here).
        if name not in specs or np.isfinite(values.sum(dtype=np.float64)):
            continue
        rows = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if specs[name].axis == "edge":
            rows = arrays["edge_index"][1, rows]
        broken[rows if specs[name].axis == "system" else _systems_of_atoms(work)[rows]] = True
    return work.indices[broken]
