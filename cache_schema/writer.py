"""Make a store, add teachers and signals to it, and hand out writers of its shards."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from molkd.cache_schema import zarr_json
from molkd.cache_schema.codebook import Codebook
from molkd.cache_schema.creation import (
    SystemTable,
    build,
    new_folder,
    require_same_systems,
)
from molkd.cache_schema.declaration import declare_signal, put_group
from molkd.cache_schema.edges import EdgeShardWriter
from molkd.cache_schema.encoding import is_fitted
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import N_EDGES, FieldSpec
from molkd.cache_schema.files import inside, sweep, write_error
from molkd.cache_schema.groups import (
    ATOMS,
    Group,
    committed_shards,
    list_signal_groups,
    list_teachers,
    load_atoms,
    load_signal,
    teacher_provenance,
)
from molkd.cache_schema.jsonfile import canonical, read_sealed
from molkd.cache_schema.layout import (
    DATA,
    LOG,
    MANIFEST,
    PLAN,
    check_name,
    check_signal_spec,
    signal_group,
    split_signal_group,
)
from molkd.cache_schema.overlay import base_of
from molkd.cache_schema.plan import Plan, Systems, read_plan, read_systems
from molkd.cache_schema.remote import local_root, writable_root
from molkd.cache_schema.shard_writer import ShardWriter
from molkd.cache_schema.signal import Signal
from molkd.cache_schema.state import most_manifest_bytes
from molkd.cache_schema.teachers import require_same


class Store:
    """A store opened to be written, or to ask what is missing in it; `reader.Cache` reads values.

    Attributes
    ----------
    path : the store's folder
    plan : packing, fingerprint and provenance of the dataset
    systems : the systems table in stored order
    input_index : (S,) for each stored system its row in the arrays `create_store` got; None if only opened
    base : of an overlay: the shared store, which is only read; what it holds is not among `groups`
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["r", "a"],
        plan: Plan,
        systems: Systems,
        input_index: NDArray[np.int64] | None,
        base: Path | None = None,
    ) -> None:
        self.path, self.mode, self.plan, self.systems, self.input_index = (
            path,
            mode,
            plan,
            systems,
            input_index,
        )
        self.base = base
        self._groups: dict[str, Group] = {ATOMS: load_atoms(plan, systems)}
        self._places: dict[str, Path] = {ATOMS: base or path}  # of the groups loaded
        self._manifest_groups: set[str] | None = None

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "a"] = "r") -> "Store":
        """Open a store; mode "a" also removes what writers that died have left.

        Raises
        ------
        CacheError
            If there is no store, or one of a newer format.
        IntegrityError
            If plan or systems table are damaged.
        """
        root = local_root(path) if mode == "r" else writable_root(path)
        plan = read_plan(root)
        store = cls(root, mode, plan, read_systems(root, plan), None, base_of(root, plan))
        if mode == "a":
            store._sweep()
        return store

    # ------------------------------------------------------------------------------------- teachers, signals

    def add_teacher(self, name: str, provenance: dict[str, Any]) -> None:
        """Describe a teacher; describing the same one again does nothing.

        Parameters
        ----------
        provenance : plain JSON values; `weights_sha256` is compared, as are the other TEACHER_IDENTITY keys

        Raises
        ------
        CacheError
            If another teacher has that name, the name cannot be part of a path, or the disk is full.
        """
        self._require_writable()
        check_name(name, "teacher")
        if not isinstance(provenance.get("weights_sha256"), str):
            raise CacheError(
                f"teacher {name}: its provenance must name the sha256 of its weights (weights_sha256)"
            )
        canonical(provenance)
        if self.base is not None and name in list_teachers(self.base):
            require_same(self.base, name, provenance)
        put_group(self.path, f"teachers/{name}", zarr_json.teacher_attributes(name, provenance))
        require_same(self.path, name, provenance)

    def signal(self, group: str) -> Signal:
        """Return the signal that a group holds.

        Raises
        ------
        CacheError
            If there is no such group.
        """
        return self._load(group).signal

    def find_signal(self, teacher: str, signal: str) -> Signal | None:
        """Return a signal as it is declared; None if it is not."""
        group = signal_group(teacher, signal)
        return self._load(group).signal if self._place(group) is not None else None

    def find_signals(self, teacher: str, signals: Iterable[str]) -> dict[str, Signal]:
        """Return those of the signals that are declared, finished or not."""
        found = {name: self.find_signal(teacher, name) for name in signals}
        return {name: signal for name, signal in found.items() if signal is not None}

    def add_signal(
        self,
        teacher: str,
        spec: FieldSpec,
        encoding: str,
        codebook: Codebook | None = None,
        recoded_from: Sequence[dict[str, Any]] = (),
    ) -> str:
        """Make room for a signal; asking for the same one again does nothing.

        A signal of which nothing is stored yet may be asked for with another encoding: it is declared anew.

        Parameters
        ----------
        codebook : of a fitted encoding; where the signal is there already with this encoding, its own stays
        recoded_from : encodings that the values went through before, see `Signal`

        Returns
        -------
        str
            The group's name for `shard_writer` and `missing_shards`.

        Raises
        ------
        CacheError
            If the teacher is unknown, or values of the signal are stored with another shape or encoding.
        """
        self._require_writable()
        check_signal_spec(spec, encoding)
        group = signal_group(teacher, spec.name)
        if teacher_provenance(self.path, teacher) is None:
            raise CacheError(
                f"{self.path}: no teacher {teacher}; it has {', '.join(self.teachers) or 'none'}"
            )
        for other in list_signal_groups(self.path, teacher):
            if other.startswith(f"{group}/") or group.startswith(f"{other}/"):
                raise CacheError(
                    f"{self.path}: signal {spec.name} cannot lie inside or around {other}; rename one"
                )
        in_manifest = group in self._names_in_manifest(group)
        known = self.find_signal(teacher, spec.name)
        if known is not None and self._places[group] == self.base:
            self._require_in_base(group, known, Signal(spec, encoding))
            return group
        if codebook is None and known is not None and known.same_as(spec, encoding):
            codebook = known.codebook
        if is_fitted(encoding) != (codebook is not None):
            raise CacheError(
                f"{self.path}: {group} in {encoding}: give the codebook fitted to it, and no other"
            )
        signal = Signal(spec, encoding, codebook, tuple(recoded_from))
        declare_signal(self.path, self.plan, self.systems, group, signal, in_manifest=in_manifest)
        self._groups.pop(group, None)  # it may have been declared anew
        return group

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers."""
        return list_teachers(self.path)

    @property
    def groups(self) -> list[str]:
        """Names of all groups that lie here: "atoms", unless this is an overlay, and one a signal."""
        own = [] if self.base is not None else [ATOMS]
        return [*own, *(g for t in self.teachers for g in list_signal_groups(self.path, t))]

    # ------------------------------------------------------------------------------------------------ shards

    def systems_of_shard(self, shard: int) -> range:
        """Return the stored indices of a shard's systems."""
        return self.systems.in_shard(shard)

    def missing_shards(self, group: str) -> list[int]:
        """Return the shards of a group that are not committed, in order."""
        loaded = self._load(group)
        return sorted(set(range(self.plan.n_shards)) - committed_shards(self._places[group], loaded))

    def shard_writer(self, group: str, shard: int) -> ShardWriter:
        """Return a context manager that writes and commits one shard.

        Raises
        ------
        CacheError
            If there is no such group or shard.
        """
        self._require_writable()
        if not 0 <= shard < self.plan.n_shards:
            raise CacheError(f"{self.path}: no shard {shard}, the store has {self.plan.n_shards}")
        loaded = self._load(group)
        if self._places[group] == self.base:
            raise CacheError(f"{self.base}: holds {group}, and an overlay never writes to it")
        self._drop_stale_manifest(loaded, shard)
        kind = EdgeShardWriter if N_EDGES.name in loaded.layouts else ShardWriter
        return kind(self.path, self.plan, self.systems, loaded, shard)

    # ----------------------------------------------------------------------------------------------- details

    def _load(self, group: str) -> Group:
        if group not in self._groups:
            try:
                place = self._place(group)
            except ValueError as error:
                raise CacheError(f"{self.path}: no group {group}; it has {', '.join(self.groups)}") from error
            if place is None:
                raise CacheError(f"{self.path}: no group {group}; it has {', '.join(self.groups)}")
            self._groups[group] = load_signal(place, self.plan, self.systems, group)
            self._places[group] = place
        return self._groups[group]

    def _place(self, group: str) -> Path | None:
        """Return the folder of the store that holds a signal: this one, or the one an overlay refers to."""
        teacher, _ = split_signal_group(group)
        if group in list_signal_groups(self.path, teacher):
            return self.path
        return (
            self.base if self.base is not None and group in list_signal_groups(self.base, teacher) else None
        )

    def _require_in_base(self, group: str, known: Signal, asked: Signal) -> None:
        """Refuse a signal that the shared store of an overlay holds in another way, or not completely."""
        if not known.same_as(asked.spec, asked.encoding):
            what = f"as {known.encoding} {known.spec.shape}, asked for {asked.encoding} {asked.spec.shape}"
        elif self.missing_shards(group):
            what = "unfinished; finish it there"
        else:
            return
        raise CacheError(
            f"{self.base}: holds {group} {what}; an overlay never writes to it, give the teacher another "
            "name (--name)"
        )

    def _drop_stale_manifest(self, group: Group, shard: int) -> None:
        """Remove a manifest that says this shard is finished though its record is gone."""
        manifest = self.path / MANIFEST
        if not manifest.exists() or shard in committed_shards(self.path, group):
            return
        if group.name in self._names_in_manifest(group.name):
            manifest.unlink(missing_ok=True)
            self._manifest_groups = None

    def _names_in_manifest(self, asked: str) -> set[str]:
        """Return the groups the manifest names; a damaged one names `asked`, it is made anew from records."""
        if not (self.path / MANIFEST).exists():
            return set()
        if self._manifest_groups is None:
            try:
                document, _ = read_sealed(
                    inside(self.path, MANIFEST), max_bytes=most_manifest_bytes(self.plan), remedy=""
                )
                self._manifest_groups = set(document.get("groups") or {})
            except IntegrityError:
                self._manifest_groups = {asked}
        return self._manifest_groups

    def _require_writable(self) -> None:
        if self.mode != "a":
            raise CacheError(f"{self.path}: opened for reading; open it with mode 'a' to write")

    def _sweep(self) -> None:
        sweep(self.path)
        sweep(inside(self.path, DATA))
        for name in self.groups:
            sweep(inside(self.path, f"{LOG}/{name}"))
            sweep(inside(self.path, f"{DATA}/{name}"))
            group = self._load(name)
            for shard in self.missing_shards(name):
                for layout in group.layouts.values():
                    sweep(inside(self.path, layout.file(shard)).parent)


def create_store(
    path: str | Path,
    *,
    ids: NDArray[np.uint8],
    n_atoms: ArrayLike,
    energy: ArrayLike,
    cell: ArrayLike,
    pbc: ArrayLike,
    source: ArrayLike,
    source_row: ArrayLike,
    source_names: Sequence[str],
    dataset: dict[str, Any],
    seed: int = 0,
    rows_per_shard: int | None = None,
) -> Store:
    """Create a store for these systems, or open the one that already holds exactly them.

    The folder appears whole, with its plan, or not at all. A store that exists keeps its own seed, packing
    and provenance.

    Parameters
    ----------
    path : the new folder, NAME.kdcache
    ids : (S, 16) from `identity.system_id`, all different
    n_atoms : (S,)
    energy : (S,) eV, NaN where unknown
    cell : (S, 3, 3) Angstrom
    pbc : (S, 3)
    source : (S,) index into `source_names`
    source_row : (S,) number of the system in its source
    dataset : provenance kept in the plan: sources, licence, units, duplicates dropped; plain JSON values.
        `labels_sha256` (`identity.labels_fingerprint`), if given, must be that of the store that exists
    seed : of the stored order
    rows_per_shard : atom rows of a shard, a multiple of 1,024; chosen by the size of the dataset if None

    Raises
    ------
    CacheError
        If the arrays make no sense, or the folder exists and is no store, or one of other systems or labels.
    """
    root = writable_root(path)
    table = SystemTable.check(
        root,
        ids=ids,
        n_atoms=n_atoms,
        energy=energy,
        cell=cell,
        pbc=pbc,
        source=source,
        source_row=source_row,
        source_names=tuple(source_names),
    )
    if (root / PLAN).exists():
        return _resume(root, table, dataset)
    try:
        with new_folder(root) as folder:
            order = build(folder, table, dataset, seed, rows_per_shard)
    except OSError as error:
        if (root / PLAN).exists():  # another process was faster
            return _resume(root, table, dataset)
        raise write_error(root, error, int(table.id.size * 13)) from error
    plan = read_plan(root)
    return Store(root, "a", plan, read_systems(root, plan), order)


def _resume(root: Path, table: SystemTable, dataset: dict[str, Any]) -> Store:
    store = Store.open(root, "a")
    store.input_index = require_same_systems(root, table, dataset, store.plan, store.systems)
    return store
