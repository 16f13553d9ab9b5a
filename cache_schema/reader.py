"""Read a store: structures, labels and teachers' signals by system, checked against the commit records."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from molkd.cache_schema.codebook import is_vector
from molkd.cache_schema.edges import EdgeReader
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import ATOM_FIELDS, N_EDGES, SYSTEM_FIELDS, FieldSpec
from molkd.cache_schema.groups import ATOMS, list_teachers, teacher_provenance
from molkd.cache_schema.layout import SCALE, split_signal_group
from molkd.cache_schema.mirror import fetch_ahead
from molkd.cache_schema.overlay import locate_groups
from molkd.cache_schema.plan import Plan, Systems, read_plan, read_systems
from molkd.cache_schema.remote import local_root
from molkd.cache_schema.runs import Runs, find_runs
from molkd.cache_schema.shard_reader import ArrayReader, FileCache
from molkd.cache_schema.signal import Signal
from molkd.cache_schema.state import GroupState, load_states, require_complete
from molkd.cache_schema.statistics import Statistics

FIELDS = (*ATOM_FIELDS, *SYSTEM_FIELDS)


@dataclass(frozen=True)
class SignalEntry:
    """One array of the store: a teacher's signal, or a field of the structures."""

    spec: FieldSpec
    encoding: str
    missing_shards: tuple[int, ...]
    statistics: Statistics | None  # None for integers and masks
    max_abs: float
    error_max_abs: float  # of decoded against given values, as the encoding left them
    error_rms: float
    held_out_error_max_abs: float  # on systems that a fitted encoding was not fitted to
    held_out_error_rms: float  # NaN if there are none
    n_rows: int  # written so far: systems, atoms or edges
    n_bytes: int  # on disk

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return not self.missing_shards

    @property
    def deviation(self) -> float:
        """Root mean square about the mean, of vectors about zero; NaN if nothing was counted."""
        if self.statistics is None or not self.statistics.count:
            return float("nan")
        squares = self.statistics.rms**2 if is_vector(self.spec) else self.statistics.variance
        return float(squares.mean() ** 0.5)

    @property
    def relative_error(self) -> float:
        """Rms error over the deviation, of rows that nothing was fitted to if there are any."""
        error = self.error_rms if np.isnan(self.held_out_error_rms) else self.held_out_error_rms
        if error == 0 or self.deviation == 0:
            return float("inf") if error else 0.0
        return error / self.deviation


@dataclass(frozen=True)
class TeacherEntry:
    """A teacher as the store knows it."""

    provenance: dict[str, Any]
    signals: dict[str, SignalEntry]


class Cache:
    """A store opened for reading.

    All arrays are in stored order, which is random: any run of systems is a fair sample.

    Attributes
    ----------
    path : the store's folder
    n_systems, n_atoms : totals
    ids : (S, 16)
    system_n_atoms : (S,)
    energy : (S,) eV, label, NaN where unknown
    cell : (S, 3, 3) Angstrom
    pbc : (S, 3)
    source, source_row : (S,) where each system came from, `source_names[source]` and the number in it
    fingerprint : of the dataset
    dataset : provenance of structures and labels
    fields : entries of the arrays under ``atoms``
    teachers : entries by name
    """

    def __init__(self, root: Path, plan: Plan, systems: Systems, states: dict[str, GroupState]) -> None:
        self.path, self.plan, self.systems = root, plan, systems
        self._states = states
        self.n_systems, self.n_atoms = plan.packing.n_systems, plan.packing.n_atoms
        self.fingerprint, self.dataset = plan.fingerprint, plan.dataset
        self.ids, self.system_n_atoms, self.energy = systems.id, systems.n_atoms, systems.energy
        self.cell, self.pbc = systems.cell, systems.pbc
        self.source, self.source_row, self.source_names = (
            systems.source,
            systems.source_row,
            systems.source_names,
        )
        self._files = FileCache()
        self._arrays = {
            (group, name): ArrayReader(state.root, state, name, self._files)
            for group, state in states.items()
            for name in state.group.layouts
        }
        self._edges = {
            group: EdgeReader(state.root, state, systems, self._files)
            for group, state in states.items()
            if N_EDGES.name in state.group.layouts
        }
        self.fields = {name: _entry(states[ATOMS], name, [name]) for name in ATOM_FIELDS}
        places = dict.fromkeys((root, states[ATOMS].root))  # an overlay, and the store it refers to
        known = {name: place for place in reversed(places) for name in list_teachers(place)}
        self.teachers: dict[str, TeacherEntry] = {
            name: TeacherEntry(teacher_provenance(known[name], name) or {}, {}) for name in sorted(known)
        }
        for group, state in states.items():
            if group != ATOMS:
                teacher, signal = split_signal_group(group)
                self.teachers[teacher].signals[signal] = _entry(state, "values", state.group.layouts)

    @classmethod
    def open(cls, path: str | Path, *, complete: bool = False) -> "Cache":
        """Open a store: a folder, or the URL of one that is read through a mirror.

        Parameters
        ----------
        complete : refuse a store with missing shards in any group

        Raises
        ------
        CacheError
            If it is no store, has a newer format or an unknown encoding, or lacks shards though it must not.
        IntegrityError
            If plan, systems table, records or metadata are damaged.
        """
        root = local_root(path)
        plan = read_plan(root)
        systems = read_systems(root, plan)
        places = locate_groups(root, plan)
        found: dict[str, GroupState] = {}
        for place in dict.fromkeys(places.values()):
            found |= load_states(place, plan, systems, [name for name in places if places[name] == place])
        states = {name: found[name] for name in places}
        if complete:
            for state in states.values():
                require_complete(state.root, state)
        return cls(root, plan, systems, states)

    def close(self) -> None:
        """Let go of open files; reading opens them again."""
        self._files.clear()

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.n_systems

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """Return one system for inspection: all fields, and what is written as ``<teacher>/<signal>``."""
        if not -self.n_systems <= index < self.n_systems:
            raise IndexError(f"system {index} of {self.n_systems}")
        index %= self.n_systems
        system = self.read([index], FIELDS)
        for teacher, entry in self.teachers.items():
            for signal, one in entry.signals.items():
                if int(self.systems.shard[index]) not in one.missing_shards:
                    values = self.read([index], (), teacher=teacher, signals=(signal,))
                    del values["n_atoms"]
                    system |= {f"{teacher}/{name.split('/', 1)[1]}": values[name] for name in values}
        return system

    def bad_systems(self, teacher: str) -> NDArray[np.int64]:
        """Return the stored indices, sorted, of systems a teacher gave up; their signals read as NaN.

        Raises
        ------
        CacheError
            If there is no such teacher.
        """
        self._require_teacher(teacher)
        bad: set[int] = set()
        for group, state in self._states.items():
            if group.startswith(f"teachers/{teacher}/"):
                bad |= state.bad_systems
        return np.array(sorted(bad), dtype=np.int64)

    def require(self, teacher: str | None = None, signals: Sequence[str] = ()) -> None:
        """Refuse what is not there, or not finished, before a run starts.

        Raises
        ------
        CacheError
            Naming the teachers or signals there are, or the shards that are missing.
        """
        require_complete(self._states[ATOMS].root, self._states[ATOMS])
        if teacher is not None:
            for signal in signals:
                require_complete(self.path, self._states[self._signal_group(teacher, signal)])

    def read(
        self,
        indices: ArrayLike,
        fields: Sequence[str] = FIELDS,
        teacher: str | None = None,
        signals: Sequence[str] = (),
        *,
        decode: bool = True,
    ) -> dict[str, NDArray[Any]]:
        """Read systems in any order.

        Parameters
        ----------
        indices : (n,) stored indices
        fields : names of ATOM_FIELDS and SYSTEM_FIELDS
        teacher, signals : whose signals, and which
        decode : False leaves signals as stored, those of a fitted encoding with ``teacher/<signal>/scale``;
            what `signal` returns tells their meaning

        Returns
        -------
        dict
            ``n_atoms`` (n,), every field, and every signal as ``teacher/<signal>``. Arrays on the atom axis
            hold the systems' rows one after the other. With a signal on edges (E, C) come
            ``teacher/<signal>/index`` (2, E), sender and receiver numbered over all atoms that are read,
            ``teacher/<signal>/shift`` (E, 3), lattice vectors to the sender's image, and
            ``teacher/<signal>/n_edges`` (n,).

        Raises
        ------
        CacheError
            If a name is unknown or a system's shard is not written.
        IntegrityError
            If stored bytes are damaged; no value is returned.
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(index) and not (index.min() >= 0 and index.max() < self.n_systems):
            raise CacheError(
                f"{self.path}: system index out of range, the store has {self.n_systems} systems"
            )
        out: dict[str, NDArray[Any]] = {"n_atoms": self.systems.n_atoms[index]}
        out |= self.read_arrays(index, self.arrays(fields, teacher, signals))
        for name in fields:
            if name in SYSTEM_FIELDS:
                out[name] = getattr(self.systems, name)[index]
        if teacher is None:
            return out
        for signal in signals:
            group = self._signal_group(teacher, signal)
            if group in self._edges:
                stored = self._edges[group].read(index)
                out[f"teacher/{signal}"] = stored.pop("values")
                out |= {f"teacher/{signal}/{name}": values for name, values in stored.items()}
            if decode:
                rows = {"values": out[f"teacher/{signal}"], SCALE: out.pop(f"teacher/{signal}/{SCALE}", None)}
                out[f"teacher/{signal}"] = self._states[group].group.signal.decode(rows)
        return out

    def arrays(
        self, fields: Sequence[str], teacher: str | None = None, signals: Sequence[str] = ()
    ) -> dict[str, ArrayReader]:
        """Return the arrays, by the names that `read` gives them, that hold a row an atom or a system.

        Raises
        ------
        CacheError
            If a name is unknown.
        """
        found: dict[str, ArrayReader] = {}
        for name in fields:
            if name in ATOM_FIELDS:
                found[name] = self._arrays[ATOMS, name]
            elif name not in SYSTEM_FIELDS:
                raise CacheError(f"{self.path}: no field {name}; there are {', '.join(FIELDS)}")
        for signal in signals:
            if teacher is None:
                raise CacheError(f"{self.path}: signal {signal} asked for without naming a teacher")
            group = self._signal_group(teacher, signal)
            if group not in self._edges:
                for name in self._states[group].group.layouts:
                    suffix = "" if name == "values" else f"/{name}"
                    found[f"teacher/{signal}{suffix}"] = self._arrays[group, name]
        return found

    def read_arrays(
        self, indices: NDArray[np.int64], arrays: Mapping[str, ArrayReader]
    ) -> dict[str, NDArray[Any]]:
        """Return the rows of systems as they are stored.

        Raises
        ------
        CacheError, IntegrityError
            As `read`.
        """
        runs: dict[str, Runs] = {}
        wanted = [(name, array, self._runs(array, indices, runs)) for name, array in arrays.items()]
        fetch_ahead(file for _, array, runs_of in wanted for file in array.files(runs_of))
        return {name: array.read(runs_of) for name, array, runs_of in wanted}

    def announce(self, indices: NDArray[np.int64], arrays: Mapping[str, ArrayReader]) -> None:
        """Tell the system that these rows will soon be read."""
        runs: dict[str, Runs] = {}
        wanted = [(array, self._runs(array, indices, runs)) for array in arrays.values()]
        fetch_ahead(file for array, runs_of in wanted for file in array.files(runs_of))
        for array, runs_of in wanted:
            array.announce(runs_of)

    def signal(self, teacher: str, name: str) -> Signal:
        """Return what a teacher's signal means and how it is stored.

        Raises
        ------
        CacheError
            If there is no such teacher or signal.
        """
        return self._states[self._signal_group(teacher, name)].group.signal

    def state(self, group: str) -> GroupState:
        """Return what of a group is written: its files, sums and bad systems.

        Raises
        ------
        CacheError
            If there is no such group.
        """
        if group not in self._states:
            raise CacheError(f"{self.path}: no group {group}; it has {', '.join(self._states)}")
        return self._states[group]

    def _runs(self, array: ArrayReader, index: NDArray[np.int64], known: dict[str, Runs]) -> Runs:
        """Return which rows to read; arrays of one axis share them in `known`."""
        axis = array.layout.spec.axis
        if axis not in known:
            if axis == "atom":
                begin, count = self.systems.row[index], self.systems.n_atoms[index].astype(np.int64)
            else:
                begin, count = self.systems.slot[index], np.ones(len(index), dtype=np.int64)
            known[axis] = find_runs(begin, count, array.layout.rows_per_file)
        return known[axis]

    def _signal_group(self, teacher: str, signal: str) -> str:
        known = self._require_teacher(teacher).signals
        if signal not in known:
            raise CacheError(
                f"{self.path}: teacher {teacher} has no signal {signal} here; "
                f"it has {', '.join(known) or 'none'}. Add it with kd cache-teacher, or take one of these"
            )
        return f"teachers/{teacher}/{signal}"

    def _require_teacher(self, teacher: str) -> TeacherEntry:
        if teacher not in self.teachers:
            raise CacheError(
                f"{self.path}: no teacher {teacher}; it has {', '.join(self.teachers) or 'none'}"
            )
        return self.teachers[teacher]


def _entry(state: GroupState, name: str, arrays: Iterable[str]) -> SignalEntry:
    layout, sums = state.group.layouts[name], state.moments.get(name)
    declared = state.group.declared
    return SignalEntry(
        spec=declared.spec if declared is not None else layout.spec,
        encoding=declared.encoding if declared is not None else layout.encoding,
        missing_shards=state.missing_shards,
        statistics=sums.statistics() if sums else None,
        max_abs=sums.max_abs if sums else 0.0,
        error_max_abs=sums.error_max_abs if sums else 0.0,
        error_rms=sums.error_rms if sums else 0.0,
        held_out_error_max_abs=sums.held_out_error_max_abs if sums else 0.0,
        held_out_error_rms=sums.held_out_error_rms if sums else float("nan"),
        n_rows=sum(files[name].rows for files in state.files.values()),
        n_bytes=sum(files[array].n_bytes for files in state.files.values() for array in arrays),
    )
