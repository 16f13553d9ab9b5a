"""The plan: which systems a store holds, in which order and shard. Written once, before any shard."""

import hashlib
import mmap
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.checks import Checks
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.files import inside
from molkd.cache_schema.identity import ID_BYTES, dataset_fingerprint
from molkd.cache_schema.jsonfile import read_sealed
from molkd.cache_schema.layout import (
    CHUNK_ROWS,
    DATA,
    FORMAT,
    MAX_EDGE_ROWS_PER_SHARD,
    MAX_JSON_BYTES,
    MAX_ROWS_PER_SHARD,
    MAX_SYSTEMS,
    PLAN,
    Packing,
    edge_rows_per_shard,
    pack,
)
from molkd.cache_schema.untrusted import brief, open_regular, read_small
from molkd.cache_schema.zarr_json import parse

KIND = "molkd cache plan"
CLAIM_SYSTEMS = 1 << 16  # tables of fewer systems are small
_MAPPED_BYTES = 1 << 20
_PROBE_SYSTEMS, _N_PROBES = 256, 64
_COPY = "restore the file from a copy, or create the store again"

# Name -> stored dtype, trailing shape, dimension names, unit; docs/cache-format.md, "systems".
SYSTEM_ARRAYS: dict[str, tuple[str, tuple[int, ...], list[str], str]] = {
    "id": ("uint8", (ID_BYTES,), ["system", "byte"], "1"),
    "shard": ("int32", (), ["system"], "1"),
    "row": ("int64", (), ["system"], "1"),
    "slot": ("int64", (), ["system"], "1"),
    "n_atoms": ("int32", (), ["system"], "1"),
    "energy": ("float64", (), ["system"], "eV"),
    "cell": ("float32", (3, 3), ["system", "lattice_vector", "xyz"], "A"),
    "pbc": ("bool", (3,), ["system", "lattice_vector"], "1"),
    "source": ("int32", (), ["system"], "1"),
    "source_row": ("int64", (), ["system"], "1"),
}


@dataclass(frozen=True)
class Plan:
    """What plan.json says."""

    seed: int
    fingerprint: str  # of the dataset: sha256 of the sorted ids
    packing: Packing
    systems: dict[str, str]  # name of a systems array -> sha256 of its file
    metadata: dict[str, str]  # zarr.json within data.zarr -> its sha256
    dataset: dict[str, Any]  # provenance as given: sources, licence, units
    sha256: str = ""  # of plan.json itself; commit records name it

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return self.packing.n_shards

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the seal."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "packing": asdict(self.packing),
            "systems": self.systems,
            "metadata": self.metadata,
            "dataset": self.dataset,
        }


@dataclass(frozen=True)
class Systems:
    """The systems table, in stored order; what a missing label is stays NaN."""

    id: NDArray[np.uint8]  # (S, 16)
    shard: NDArray[np.int32]  # (S,)
    row: NDArray[np.int64]  # (S,) first row on the atom axis
    slot: NDArray[np.int64]  # (S,) row on the system axis of a teacher's arrays
    n_atoms: NDArray[np.int32]  # (S,)
    energy: NDArray[np.float64]  # (S,) eV
    cell: NDArray[np.float32]  # (S, 3, 3) A
    pbc: NDArray[np.bool_]  # (S, 3)
    source: NDArray[np.int32]  # (S,) index into source_names
    source_row: NDArray[np.int64]  # (S,) number of the system in its source
    source_names: tuple[str, ...]

    def in_shard(self, shard: int) -> range:
        """Return the stored indices of a shard's systems; they follow one another."""
        begin, end = np.searchsorted(self.shard, [shard, shard + 1])
        return range(int(begin), int(end))

    def rows_in_shard(self, shard: int) -> int:
        """Return how many atom rows of a shard are used."""
        systems = self.in_shard(shard)
        return int(self.n_atoms[systems.start : systems.stop].sum())

    def edge_rows(self, max_per_atom: int) -> int:
        """Return the rows that a shard has on the axis of edges, at most `max_per_atom` an atom.

        Raises
        ------
        CacheError
            If that is more than the format holds.
        """
        is_periodic = np.atleast_1d(self.pbc.any(axis=1))
        rows = edge_rows_per_shard(self.shard, self.n_atoms, is_periodic, max_per_atom)
        if rows > MAX_EDGE_ROWS_PER_SHARD:
            raise CacheError(
                f"{max_per_atom} edges an atom need {rows} rows a shard, at most {MAX_EDGE_ROWS_PER_SHARD} "
                "are possible; make the store again with smaller shards (--shard-atoms)"
            )
        return rows


def read_plan(root: Path) -> Plan:
    """Read and check plan.json.

    Raises
    ------
    CacheError
        If the folder is no store, or one of a newer format.
    IntegrityError
        If the plan is damaged.
    """
    path = root / PLAN
    if root.is_file():
        raise CacheError(f"{root}: is a file, not a store; make a store of it with kd ingest")
    if not root.is_dir():
        raise CacheError(
            f"{root}: no such folder; give the path of a store (NAME.kdcache), or make one with kd ingest"
        )
    if not path.is_file():
        raise CacheError(
            f"{root}: not a store (no {PLAN} in it); give a folder made by kd ingest or kd cache-teacher"
        )
    document, digest = read_sealed(inside(root, PLAN), max_bytes=MAX_JSON_BYTES, remedy=_COPY)
    check_format(document, KIND, path)
    check = Checks(str(path))
    table = check.table(document, "packing")
    packing = Packing(
        n_systems=check.integer(table, "n_systems", 1, MAX_SYSTEMS, "packing."),
        n_atoms=check.integer(table, "n_atoms", 1, MAX_SYSTEMS * MAX_ROWS_PER_SHARD, "packing."),
        n_shards=check.integer(table, "n_shards", 1, MAX_SYSTEMS, "packing."),
        rows_per_shard=check.integer(table, "rows_per_shard", CHUNK_ROWS, MAX_ROWS_PER_SHARD, "packing."),
        systems_per_shard=check.integer(table, "systems_per_shard", 1, MAX_ROWS_PER_SHARD, "packing."),
        chunk_rows=check.integer(table, "chunk_rows", CHUNK_ROWS, CHUNK_ROWS, "packing."),
    )
    if packing.rows_per_shard % CHUNK_ROWS:
        check.problem("packing.rows_per_shard", f"{packing.rows_per_shard} is no multiple of {CHUNK_ROWS}")
    systems = check.hex_table(document, "systems", 64)
    if set(systems) != set(SYSTEM_ARRAYS):
        check.problem("systems", f"expected exactly the arrays {', '.join(SYSTEM_ARRAYS)}")
    plan = Plan(
        seed=check.integer(document, "seed", 0, (1 << 63) - 1),
        fingerprint=check.hexadecimal(document, "fingerprint", 64),
        packing=packing,
        systems=systems,
        metadata=check.hex_table(document, "metadata", 64),
        dataset=check.table(document, "dataset"),
        sha256=digest,
    )
    check.finish(_COPY)
    return plan


def check_format(document: dict[str, Any], kind: str, path: Path) -> None:
    """Refuse a sealed file of another kind or of a newer format.

    Raises
    ------
    CacheError
        Saying which, and what to do.
    """
    found = document.get("format")
    if document.get("kind") != kind:
        raise CacheError(
            f"{path}: kind {brief(document.get('kind'))}, expected {kind!r}; this is not a store of molkd"
        )
    if type(found) is int and found > FORMAT:
        raise CacheError(f"{path}: format {brief(found)}, this molkd reads up to {FORMAT}; update molkd")
    if type(found) is not int or found != FORMAT:
        raise IntegrityError(f"{path}: format {brief(found)}, expected {FORMAT}; {_COPY}")


def read_systems(root: Path, plan: Plan) -> Systems:
    """Read and check the systems table.

    Raises
    ------
    IntegrityError
        If an array is missing, of the wrong size, not what the plan was made with, or inconsistent.
    """
    arrays = {name: read_system_array(root, plan, name) for name in SYSTEM_ARRAYS}
    path = root / DATA / "systems"
    attributes = parse(read_metadata(root, plan, "systems/zarr.json"), str(path))["attributes"]
    names = attributes.get("source_names")
    check = Checks(str(path))
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        check.problem("source_names", "no list of texts")
        names = []
    n_atoms = arrays["n_atoms"]
    if (n_atoms < 1).any() or n_atoms.max() > plan.packing.rows_per_shard:
        check.problem("n_atoms", "a system has no atoms, or more than a shard")
    else:
        packing, places = pack(n_atoms, plan.packing.rows_per_shard)
        if packing != plan.packing:
            check.problem("n_atoms", "do not give the packing of the plan")
        for name in ("shard", "row", "slot"):
            if not np.array_equal(arrays[name], getattr(places, name)):
                check.problem(name, "is not where packing puts the systems")
    if names and not ((arrays["source"] >= 0) & (arrays["source"] < len(names))).all():
        check.problem("source", "points beyond source_names")
    if dataset_fingerprint(arrays["id"]) != plan.fingerprint:
        check.problem("id", "does not give the fingerprint of the plan")
    check.finish(_COPY)
    return Systems(**arrays, source_names=tuple(names))


def read_system_array(root: Path, plan: Plan, name: str) -> NDArray[Any]:
    """Read one array of the systems table and compare its sha256.

    Raises
    ------
    IntegrityError
        If the file is missing, cut off or damaged.
    """
    dtype, tail, _, _ = SYSTEM_ARRAYS[name]
    shape = (plan.packing.n_systems, *tail)
    path = inside(root, system_file(name))
    expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if not path.is_file():
        raise IntegrityError(f"{path}: systems/{name} is missing; {_COPY}")
    with os.fdopen(open_regular(path), "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size != expected:
            raise IntegrityError(f"{path}: systems/{name} has {size} bytes, expected {expected}; {_COPY}")
        if name == "id":
            _require_ids(handle, path, plan.packing.n_systems)
        raw = _content(handle, expected)
    if hashlib.sha256(raw.data).hexdigest() != plan.systems[name]:
        raise IntegrityError(f"{path}: systems/{name} is damaged (its sha256 differs from the plan); {_COPY}")
    if dtype == "bool" and raw.max() > 1:
        raise IntegrityError(f"{path}: systems/{name} holds values that are neither 0 nor 1; {_COPY}")
    return raw.view(np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


def _content(handle: BinaryIO, n_bytes: int) -> NDArray[np.uint8]:
    """Return the bytes of a file; those of a large one stay on disk and are shared by all processes."""
    if n_bytes < _MAPPED_BYTES:
        return np.frombuffer(handle.read(n_bytes), np.uint8)
    return np.frombuffer(mmap.mmap(handle.fileno(), n_bytes, access=mmap.ACCESS_READ), np.uint8)


def _require_ids(handle: BinaryIO, path: Path, n_systems: int) -> None:
    """Look at parts of a large table of ids before any memory is taken for the tables that go with it.

    Ids are hashes, all different. A file that was only given a size, or is filled with anything else, is not
    worth a table: the number of systems that it stands for is a claim.
    """
    if n_systems < CLAIM_SYSTEMS:
        return
    for begin in np.linspace(0, n_systems - _PROBE_SYSTEMS, _N_PROBES).astype(np.int64):
        handle.seek(int(begin) * ID_BYTES)
        ids = np.frombuffer(handle.read(_PROBE_SYSTEMS * ID_BYTES), dtype=f"V{ID_BYTES}")
        if len(np.unique(ids)) < _PROBE_SYSTEMS:
            raise IntegrityError(f"{path}: systems/id: ids are not all different; {_COPY}")
    handle.seek(0)


def system_file(name: str) -> str:
    """Return the path of a systems array's file within the store."""
    tail = SYSTEM_ARRAYS[name][1]
    return f"{DATA}/systems/{name}/c/{'/'.join(['0'] * (1 + len(tail)))}"


def read_metadata(root: Path, plan: Plan, name: str) -> bytes:
    """Read a zarr.json that the plan names and compare its sha256.

    Raises
    ------
    IntegrityError
        If it is missing or damaged.
    """
    path = inside(root, f"{DATA}/{name}")
    if name not in plan.metadata or not path.is_file():
        raise IntegrityError(f"{path}: missing; {_COPY}")
    raw = read_small(path, MAX_JSON_BYTES, _COPY)
    if hashlib.sha256(raw).hexdigest() != plan.metadata[name]:
        raise IntegrityError(f"{path}: damaged (its sha256 differs from the plan); {_COPY}")
    return raw
