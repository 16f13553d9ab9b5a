"""A short measured probe of what stage one will use: the teacher, its graphs, and the disk."""

import contextlib
import os
import time
import uuid
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from molkd.cache_schema.encoding import finite_rows
from molkd.pipeline.data.system import System
from molkd.pipeline.device import synchronize
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.graphs.batch import batch_from_systems, to_device
from molkd.pipeline.teachers.interface import Teacher

_SECONDS = 3.0
_FILE_BYTES = 32 * 2**20
_MOST_ROWS = 50_000  # of a signal in memory; edges would take gigabytes


@dataclass(frozen=True)
class Probe:
    """What a few batches told."""

    teacher_rate: float  # systems per second
    graph_rate: float
    edges_per_atom: float  # of the teacher's signal on edges; 0 if it was not asked for
    features: dict[str, NDArray[np.float32]]  # finite rows of the signals to keep, in the order of systems


def probe_teacher(
    teacher: Teacher,
    systems: Sequence[System],
    signals: Collection[str],
    keep: Collection[str],
    most_atoms: int,
    most_edges: int,
) -> Probe:
    """Run and time the teacher, and the building of graphs, for a few seconds after a batch to warm up.

    Parameters
    ----------
    keep : signals whose rows are to be returned, evenly thinned out where they are many
    most_atoms, most_edges : of a batch; one that the device cannot hold is halved, as in the pass itself

    Raises
    ------
    TeacherError
        If a single system needs more memory than the device has.
    """
    is_warm, done, n_atoms, n_edges, computing, building = False, 0, 0, 0, 0.0, 0.0
    rows: dict[str, list[NDArray[np.float32]]] = {s: [] for s in keep}
    waiting = deque(cut_by_atoms(systems, most_atoms))
    while waiting and computing + building < _SECONDS:
        part = waiting.popleft()
        began = time.perf_counter()
        batch = batch_from_systems(part, teacher.neighbor_rule, teacher.dtype)
        built = time.perf_counter()
        building += built - began
        size = batch.edge_index.shape[1]
        if len(part) > 1 and size > most_edges:
            waiting.extendleft((part[len(part) // 2 :], part[: len(part) // 2]))
            continue
        try:
            batch = to_device(batch, teacher.device)  # in the pass itself this happens beside the teacher
            synchronize(teacher.device)
            moved = time.perf_counter()
            out = teacher.compute(batch, signals)
            synchronize(teacher.device)
        except torch.OutOfMemoryError as error:
            if len(part) == 1:
                raise TeacherError(
                    f"{part[0].source}: {batch.n_atoms} atoms with {size} edges need more memory than "
                    f"{teacher.device} has; take a larger device, or --device cpu"
                ) from error
            most_edges = size - 1
            waiting.appendleft(part)
            continue
        if not is_warm:  # kernels are chosen and memory is taken once
            is_warm, building = True, 0.0
            waiting.appendleft(part)
            continue
        computing += time.perf_counter() - moved
        done += len(part)
        n_atoms += batch.n_atoms
        n_edges += out["edge_index"].shape[1] if "edge_index" in out else 0
        for s in keep:
            step = -(-len(out[s]) * len(systems) // (_MOST_ROWS * len(part))) or 1
            values = out[s][::step].float().cpu().numpy()
            rows[s].append(values[finite_rows(values)])
    features = {s: np.concatenate(parts) for s, parts in rows.items()}
    return Probe(done / computing, done / building, n_edges / n_atoms, features)


def write_bandwidth(folder: Path) -> float | None:
    """Return bytes per second of one file written and forced to disk; None where nothing can be written."""
    probe = folder / f".tmp-kd-probe-{uuid.uuid4().hex[:8]}"
    block = np.random.default_rng(0).bytes(2**20)
    try:
        began = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(_FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return _FILE_BYTES / (time.perf_counter() - began)
    except OSError:  # no right to write there, or a full disk
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def cut_by_atoms(systems: Sequence[System], most_atoms: int) -> list[Sequence[System]]:
    """Cut systems into groups of as many as fit in `most_atoms`, at least one."""
    groups, begin, n_atoms = [], 0, 0
    for k, system in enumerate(systems):
        if k > begin and n_atoms + system.n_atoms > most_atoms:
            groups.append(systems[begin:k])
            begin, n_atoms = k, 0
        n_atoms += system.n_atoms
    return [*groups, systems[begin:]]
