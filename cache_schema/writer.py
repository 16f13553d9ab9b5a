"""Make a store, add teachers and signals to it, and hand out writers of its shards."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from molkd.cache_schema import zarr_json
from molkd.cache_schema.codebook import Codebook
from molkd.cache_schema.creation import (
    LABELS_SHA256,
    SystemTable,
    build,
    describe_difference,
    match_order,
)
from molkd.cache_schema.declaration import declare_signal, put_group
from molkd.cache_schema.edges import EdgeShardWriter
from molkd.cache_schema.encoding import is_fitted
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import N_EDGES, FieldSpec
from molkd.cache_schema.files import (
    exclusive,
    fsync_folder,
    make_folder,
    sweep,
    temporary_path,
    write_error,
)
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
    MAX_MANIFEST_BYTES,
    PLAN,
    check_name,
    check_signal_spec,
    signal_group,
    split_signal_group,
)
from molkd.cache_schema.plan import Plan, Systems, read_plan, read_systems
from molkd.cache_schema.remote import local_root, writable_root
from molkd.cache_schema.shard_writer import ShardWriter
from molkd.cache_schema.signal import Signal

# What makes two teachers of one name the same; the rest of the provenance may differ (dates, hosts, taps).
TEACHER_IDENTITY = (
    "weights_sha256",
    "architecture",
    "config",
    "neighbor_rule",
    "precision",
    "energy_reference",
)


class Store:
    """A store opened to be written, or to ask what is missing in it; `reader.Cache` reads values.

    Attributes
    ----------
    path : the store's folder
    plan : packing, fingerprint and provenance of the dataset
    systems : the systems table in stored order
    input_index : (S,) for each stored system its row in the arrays `create_store` got; None if only opened
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["r", "a"],
        plan: Plan,
        systems: Systems,
        input_index: NDArray[np.int64] | None,
    ) -> None:
        self.path, self.mode, self.plan, self.systems, self.input_index = (
            path,
            mode,
            plan,
            systems,
            input_index,
        )
        self._groups: dict[str, Group] = {ATOMS: load_atoms(plan, systems)}
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
        store = cls(root, mode, plan, read_systems(root, plan), None)
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
        put_group(self.path, f"teachers/{name}", zarr_json.teacher_attributes(name, provenance))
        known = teacher_provenance(self.path, name) or {}
        differs = [k for k in TEACHER_IDENTITY if canonical(known.get(k)) != canonical(provenance.get(k))]
        if differs:
            shown = "; ".join(
                f"{k} {_short(known.get(k))}, given {_short(provenance.get(k))}" for k in differs
            )
            raise CacheError(
                f"{self.path}: its teacher {name} is another one ({shown}); "
                "give this one another name, or take the teacher the store was made with"
            )

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
        return self._load(group).signal if group in list_signal_groups(self.path, teacher) else None

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
        """Names of all groups: "atoms" and one a signal."""
        return [ATOMS, *(g for t in self.teachers for g in list_signal_groups(self.path, t))]

    # ------------------------------------------------------------------------------------------------ shards

    def systems_of_shard(self, shard: int) -> range:
        """Return the stored indices of a shard's systems."""
        return self.systems.in_shard(shard)

    def missing_shards(self, group: str) -> list[int]:
        """Return the shards of a group that are not committed, in order."""
        return sorted(set(range(self.plan.n_shards)) - committed_shards(self.path, self._load(group)))

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
        self._drop_stale_manifest(loaded, shard)
        kind = EdgeShardWriter if N_EDGES.name in loaded.layouts else ShardWriter
        return kind(self.path, self.plan, self.systems, loaded, shard)

    # ----------------------------------------------------------------------------------------------- details

    def _load(self, group: str) -> Group:
        if group not in self._groups:
            try:
                teacher, _ = split_signal_group(group)
            except ValueError as error:
                raise CacheError(f"{self.path}: no group {group}; it has {', '.join(self.groups)}") from error
            if group not in list_signal_groups(self.path, teacher):
                raise CacheError(f"{self.path}: no group {group}; it has {', '.join(self.groups)}")
            self._groups[group] = load_signal(self.path, self.plan, self.systems, group)
        return self._groups[group]

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
                document, _ = read_sealed(self.path / MANIFEST, max_bytes=MAX_MANIFEST_BYTES, remedy="")
                self._manifest_groups = set(document.get("groups", {}))
            except IntegrityError:
                self._manifest_groups = {asked}
        return self._manifest_groups

    def _require_writable(self) -> None:
        if self.mode != "a":
            raise CacheError(f"{self.path}: opened for reading; open it with mode 'a' to write")

    def _sweep(self) -> None:
        sweep(self.path)
        sweep(self.path / DATA)
        for name in self.groups:
            sweep(self.path / LOG / name)
            sweep(self.path / DATA / name)
            group = self._load(name)
            for shard in self.missing_shards(name):
                for layout in group.layouts.values():
                    sweep((self.path / layout.file(shard)).parent)


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
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise CacheError(
            f"{root}: exists and is not a store (no {PLAN} in it); choose another name, or remove it"
        )
    temporary = temporary_path(root.absolute())
    try:
        make_folder(temporary.parent)
        sweep(temporary.parent)
        temporary.mkdir()
        with exclusive(temporary):  # alive, whatever its age
            if root.exists():  # an empty folder made beforehand keeps its rights
                _take_rights(temporary, root)
            order = build(temporary, table, dataset, seed, rows_per_shard)
            temporary.rename(root)
        fsync_folder(root.absolute().parent)
    except OSError as error:
        if (root / PLAN).exists():  # another process was faster
            return _resume(root, table, dataset)
        raise write_error(root, error, int(table.id.size * 13)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    plan = read_plan(root)
    return Store(root, "a", plan, read_systems(root, plan), order)


def _resume(root: Path, table: SystemTable, dataset: dict[str, Any]) -> Store:
    store = Store.open(root, "a")
    if table.fingerprint != store.plan.fingerprint:
        raise CacheError(
            f"{root}: holds other systems: {describe_difference(table, store.systems.id)}; "
            "choose another name for the store, or give the same data"
        )
    store.input_index = match_order(table, store.systems.id)
    changed = ~_same(table.energy[store.input_index], store.systems.energy)
    if changed.any():
        raise CacheError(
            f"{root}: {int(changed.sum())} of its systems have other energy labels than the ones given; "
            "choose another name for the store, or give the same labels"
        )
    known, given = store.plan.dataset.get(LABELS_SHA256), dataset.get(LABELS_SHA256)
    if known is not None and given is not None and known != given:
        raise CacheError(
            f"{root}: holds the same systems with other forces, tags or fixed atoms than the ones given "
            f"(labels {_short(known)}, given {_short(given)}); "
            "choose another name for the store, or give the same labels"
        )
    return store


def _same(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = (a == b) | (np.isnan(a) & np.isnan(b))
    return same


def _take_rights(folder: Path, like: Path) -> None:
    rights = like.stat()
    if folder.stat().st_gid != rights.st_gid:
        os.chown(folder, -1, rights.st_gid)
    folder.chmod(rights.st_mode & 0o7777)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 20 else f"{text[:16]}..."
