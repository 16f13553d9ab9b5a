"""What the teacher gave, on its way into the files of a shard: checked, put into rows, written, committed."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.errors import ConflictError
from molkd.cache_schema.fields import EDGE_INDEX, EDGE_SHIFT, N_EDGES, FieldSpec
from molkd.cache_schema.layout import SCALE
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.shard_writer import ShardWriter
from molkd.pipeline.device_narrowing import BROKEN, sums_of
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
    narrowed = BROKEN in arrays
    broken = work.indices[arrays[BROKEN]] if narrowed else _non_finite_systems(arrays, specs, work)
    if len(broken) and not skip_bad:
        raise TeacherError(
            f"{source_of(cache, int(broken[0]))}: the teacher gives non-finite numbers for this system; "
            "look at the structure, or quarantine such systems with --skip-bad"
        )
    for index in broken:
        log.warning("%s: non-finite teacher output, quarantined", source_of(cache, int(index)))
    written.bad_systems.update(broken.tolist())
    for name, writer in writers.items():
        rows = {"values": arrays[name]}
        if f"{name}/{SCALE}" in arrays:
            rows[SCALE] = arrays[f"{name}/{SCALE}"]
        if specs[name].axis == "edge":
            rows = edge_rows(rows, arrays["edge_index"], arrays["edge_shift"], work)
        if narrowed:
            writer.write_narrowed(rows, {"values": sums_of(name, arrays)}, bad_systems=broken.tolist())
        else:
            writer.write(rows, bad_systems=broken.tolist())


def commit(writers: Mapping[str, ShardWriter], written: Written) -> None:
    """Force the shard's files to disk and commit them; a writer that lacks rows commits nothing.

    What another process committed meanwhile stays as it is: two computations on a GPU, or with different
    numbers of threads, round differently.
    """
    with ExitStack() as stack:
        for writer in writers.values():
            stack.push(partial(_leave, writer, written))


def _leave(
    writer: ShardWriter,
    written: Written,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    try:
        writer.__exit__(kind, error, trace)
    except ConflictError as conflict:
        log.warning("%s", conflict)
    else:
        written.n_bytes += writer.n_bytes if error is None else 0


def edge_rows(
    rows: Arrays, edge_index: NDArray[np.integer[Any]], edge_shift: NDArray[Any], work: Work
) -> Arrays:
    """Return the rows of a signal on edges as a store takes them: by system, atoms counted within it.

    Parameters
    ----------
    rows : arrays of the signal, (E, ...) each
    edge_index : (2, E) over the batch
    edge_shift : (E, 3)
    """
    index, shift = edge_index.T, edge_shift
    system = _systems_of_atoms(work)[index[:, 1]]  # (E,)
    if (np.diff(system) < 0).any():
        order = np.argsort(system, kind="stable")
        system, index, shift = system[order], index[order], shift[order]
        rows = {name: values[order] for name, values in rows.items()}
    first_atom = np.cumsum(work.n_atoms) - work.n_atoms  # (S,)
    return rows | {
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
