"""Where everything lies: names, paths, how systems are ordered and packed, and the shape of every array."""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.codebook import Codebook
from molkd.cache_schema.encoding import ENCODINGS, check_signal_encoding, exact_encoding, is_fitted
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import (
    ATOM_FIELDS,
    EDGE_INDEX,
    EDGE_SHIFT,
    MAX_EDGES_PER_ATOM,
    N_EDGES,
    FieldSpec,
)

FORMAT = 1
CHUNK_ROWS = 1024  # rows of an inner chunk
DEFAULT_ROWS_PER_SHARD = 65_536
MIN_ROWS_PER_SHARD = 4_096  # chosen automatically; smaller ones may be asked for
WANTED_SHARDS = 8
MAX_ROWS_PER_SHARD = 1 << 30
MAX_SYSTEMS = 1 << 31
MAX_ROW_VALUES = 1 << 20  # values in one row of a signal
MAX_EDGE_ROWS_PER_SHARD = 1 << 34
SCALE = "scale"  # the array beside the codes of a fitted encoding

PLAN, DATA, LOG, MANIFEST = "plan.json", "data.zarr", "log", "manifest.json"
MAX_JSON_BYTES = 1 << 22  # plan, overlay.json and each zarr.json
MAX_RECORD_BYTES = 1 << 25
MAX_MANIFEST_BYTES = 1 << 32
SUFFIX = ".kdcache"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED = frozenset({"values", "zarr.json", "c"})
_MIX_1, _MIX_2, _GOLDEN = (
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
    np.uint64(0x9E3779B97F4A7C15),
)


# ------------------------------------------------------------------------------------------------ names


def check_name(name: str, what: str, *, parts: bool = False) -> str:
    """Return `name` if it may become part of a path; `parts` allows "/" between parts.

    Raises
    ------
    CacheError
        Naming the rule.
    """
    pieces = name.split("/") if parts else [name]
    if len(pieces) > 4 or not all(_NAME.fullmatch(p) and p not in _RESERVED for p in pieces):
        raise CacheError(
            f"{what} {name!r}: names are letters, digits, '_', '.', '-', begin with a letter or digit, "
            f"have at most 64 characters{' a part' if parts else ''}, and are none of "
            f"{', '.join(sorted(_RESERVED))}"
        )
    return name


def signal_group(teacher: str, signal: str) -> str:
    """Return the group of a teacher's signal: ``teachers/painn/layer/U4``."""
    return f"teachers/{check_name(teacher, 'teacher')}/{check_name(signal, 'signal', parts=True)}"


def split_signal_group(group: str) -> tuple[str, str]:
    """Return teacher and signal of a group that `signal_group` made."""
    head, teacher, signal = group.split("/", 2)
    if head != "teachers" or signal_group(teacher, signal) != group:
        raise CacheError(f"{group}: not the group of a teacher's signal")
    return teacher, signal


def record_path(group: str, shard: int) -> str:
    """Return where the commit record of a shard lies in the store."""
    return f"{LOG}/{group}/{shard:06d}.json"


# ---------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Packing:
    """The numbers that fix where every row lies."""

    n_systems: int
    n_atoms: int
    n_shards: int
    rows_per_shard: int
    systems_per_shard: int  # the most systems in any shard: places a shard has on the system axis
    chunk_rows: int = CHUNK_ROWS


@dataclass(frozen=True)
class Places:
    """Where each system lies, in stored order, all (S,)."""

    shard: NDArray[np.int32]
    row: NDArray[np.int64]  # first row on the atom axis
    slot: NDArray[np.int64]  # row on the system axis of a teacher's arrays


def stored_order(ids: NDArray[np.uint8], seed: int) -> NDArray[np.int64]:
    """Return the random permutation (S,) in which systems with these ids (S, 16) are stored.

    Systems are sorted by a 64-bit key mixed from seed and id (docs/cache-format.md, Order), so the result
    depends neither on the order of the input nor on a library's generator.
    """
    low, high = (half.astype(np.uint64) for half in np.ascontiguousarray(ids).view("<u8").T)
    key = _mix(_mix(low ^ _mix(np.array([seed], dtype=np.uint64))) ^ high)
    big_high, big_low = (half.astype(np.uint64) for half in np.ascontiguousarray(ids).view(">u8").T)
    return np.lexsort((big_low, big_high, key)).astype(np.int64)  # equal keys: by the bytes of the id


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finalizer of splitmix64 of x, element by element; arithmetic is modulo 2**64."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def choose_rows_per_shard(n_atoms: NDArray[np.integer[Any]], asked: int | None = None) -> int:
    """Return atom rows per shard: the default, or less so that a small dataset still has about 8 shards.

    Raises
    ------
    CacheError
        If the number asked for is not a multiple of the chunk or too small for the largest system.
    """
    largest = -(-int(n_atoms.max()) // CHUNK_ROWS) * CHUNK_ROWS
    if asked is None:
        share = int(n_atoms.sum()) // WANTED_SHARDS // CHUNK_ROWS * CHUNK_ROWS
        return max(min(share, DEFAULT_ROWS_PER_SHARD), MIN_ROWS_PER_SHARD, largest)
    if asked % CHUNK_ROWS or not largest <= asked <= MAX_ROWS_PER_SHARD:
        raise CacheError(
            f"rows per shard {asked}: must be a multiple of {CHUNK_ROWS}, at least {largest} "
            f"(the largest system) and at most {MAX_ROWS_PER_SHARD}"
        )
    return asked


def pack(n_atoms: NDArray[np.integer[Any]], rows_per_shard: int) -> tuple[Packing, Places]:
    """Put systems into shards in stored order; one that does not fit opens the next shard."""
    ends = np.cumsum(n_atoms, dtype=np.int64)
    shard = np.empty(len(n_atoms), dtype=np.int32)
    first = [0]  # first system of each shard
    while first[-1] < len(n_atoms):
        before = ends[first[-1]] - n_atoms[first[-1]]
        end = int(np.searchsorted(ends, before + rows_per_shard, side="right"))
        assert end > first[-1]
        shard[first[-1] : end] = len(first) - 1
        first.append(end)
    begin = np.array(first[:-1], dtype=np.int64)
    systems_per_shard = int(np.diff(first).max())
    offset = ends - n_atoms - (ends - n_atoms)[begin][shard]
    places = Places(
        shard=shard,
        row=shard.astype(np.int64) * rows_per_shard + offset,
        slot=shard.astype(np.int64) * systems_per_shard + np.arange(len(n_atoms)) - begin[shard],
    )
    return Packing(len(n_atoms), int(ends[-1]), len(begin), rows_per_shard, systems_per_shard), places


# ----------------------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class ArrayLayout:
    """One array written shard by shard: a file is one shard's rows; of atoms and edges with an index."""

    path: str  # within data.zarr, "atoms/positions"
    spec: FieldSpec  # of what is stored
    encoding: str  # a plain one
    n_files: int
    rows_per_file: int
    chunk_rows: int
    values: FieldSpec | None  # of what it means, if that is floating-point: then records hold sums over it

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Stored dtype."""
        return np.dtype(ENCODINGS[self.encoding].dtype)

    @property
    def is_sharded(self) -> bool:
        """Whether files hold several inner chunks and an index."""
        return self.spec.axis != "system"

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.spec.shape, dtype=np.int64)) * self.dtype.itemsize

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk."""
        return self.row_bytes * self.chunk_rows

    @property
    def n_chunks(self) -> int:
        """Inner chunks of a full file."""
        return self.rows_per_file // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of a file: offset and length of each chunk, and a crc32c."""
        return 16 * self.n_chunks + 4 if self.is_sharded else 0

    def stored_chunks(self, n_rows: int) -> int:
        """Inner chunks that a file with `n_rows` rows holds; the rest is marked missing."""
        return -(-n_rows // self.chunk_rows)

    def file_bytes(self, n_rows: int) -> int:
        """Size of a file with `n_rows` rows."""
        return self.stored_chunks(n_rows) * self.chunk_bytes + self.index_bytes

    def file(self, shard: int) -> str:
        """Return the path of a shard's file within the store."""
        return f"{DATA}/{self.path}/c/{'/'.join([str(shard), *['0'] * len(self.spec.shape)])}"


def signal_layout(
    group: str,
    spec: FieldSpec,
    encoding: str,
    packing: Packing,
    edge_rows: int = 0,
    codebook: Codebook | None = None,
) -> dict[str, ArrayLayout]:
    """Return the arrays of a signal: ``values``, their scale, and on the edge axis which edges they are of.

    Parameters
    ----------
    edge_rows : rows that a shard has room for on the edge axis, from `edge_rows_per_shard`
    codebook : of a fitted encoding
    """
    rows = {"atom": packing.rows_per_shard, "system": packing.systems_per_shard, "edge": edge_rows}
    chunk = packing.chunk_rows
    arrays = {"values": (spec, encoding)}
    if codebook is not None:
        shape = (*spec.shape[:-1], codebook.row_bytes)
        codes = replace(spec, shape=shape, dtype=codebook.stored_dtype)
        scale = FieldSpec(SCALE, spec.axis, (), "float16", "1", max_per_atom=spec.max_per_atom)
        arrays = {"values": (codes, codes.dtype), SCALE: (scale, exact_encoding(scale))}
    if spec.axis == "edge":
        arrays |= {f.name: (f, exact_encoding(f)) for f in (EDGE_INDEX, EDGE_SHIFT, N_EDGES)}
    return {
        name: ArrayLayout(
            path=f"{group}/{name}",
            spec=one,
            encoding=how,
            n_files=packing.n_shards,
            rows_per_file=rows[one.axis],
            chunk_rows=rows[one.axis] if one.axis == "system" else chunk,
            values=spec if name == "values" else None,
        )
        for name, (one, how) in arrays.items()
    }


def edge_rows_per_shard(
    shard: NDArray[np.int32], n_atoms: NDArray[np.int32], is_periodic: NDArray[np.bool_], max_per_atom: int
) -> int:
    """Return the rows that every shard gets on the edge axis: room for the most edges that any may have.

    Parameters
    ----------
    shard, n_atoms, is_periodic : (S,) of the systems; an atom without images has at most n - 1 neighbors
    max_per_atom : of the signal
    """
    most = np.where(is_periodic, max_per_atom, np.minimum(max_per_atom, n_atoms - 1)) * n_atoms.astype(
        np.int64
    )
    begins = np.searchsorted(shard, np.arange(shard[-1] + 1))
    rows = int(np.add.reduceat(most, begins).max())
    return max(-(-rows // CHUNK_ROWS), 1) * CHUNK_ROWS


def atoms_layout(packing: Packing) -> dict[str, ArrayLayout]:
    """Return the arrays of the group ``atoms``."""
    return {
        name: ArrayLayout(
            f"atoms/{name}",
            spec,
            exact_encoding(spec),
            packing.n_shards,
            packing.rows_per_shard,
            packing.chunk_rows,
            spec if ENCODINGS[exact_encoding(spec)].is_float else None,
        )
        for name, spec in ATOM_FIELDS.items()
    }


def check_signal_spec(spec: FieldSpec, encoding: str) -> None:
    """Refuse what format 1 cannot hold.

    Raises
    ------
    CacheError
        Naming the signal and what does not fit.
    """
    if spec.axis not in ("system", "atom", "edge"):
        raise CacheError(f"signal {spec.name}: axis {spec.axis!r} is not part of format {FORMAT}")
    if not (spec.axis == "edge") <= spec.max_per_atom <= (spec.axis == "edge") * MAX_EDGES_PER_ATOM:
        raise CacheError(
            f"signal {spec.name}: at most {spec.max_per_atom} edges an atom; an edge signal names a number "
            f"from 1 to {MAX_EDGES_PER_ATOM}, any other signal 0"
        )
    if spec.dtype not in ("float32", "float64"):
        raise CacheError(f"signal {spec.name}: dtype {spec.dtype}, expected float32 or float64")
    if spec.symmetry not in ("invariant", "vector", "none"):
        raise CacheError(f"signal {spec.name}: symmetry {spec.symmetry!r} is unknown")
    check_signal_encoding(encoding, f"signal {spec.name}")
    if is_fitted(encoding) and (not spec.shape or spec.dtype != "float32" or spec.unit != "1"):
        raise CacheError(f"signal {spec.name}: {encoding} is for features with channels; choose fp32")
    if (
        len(spec.shape) > 3
        or any(n < 1 for n in spec.shape)
        or np.prod(spec.shape, dtype=float) > MAX_ROW_VALUES
    ):
        raise CacheError(f"signal {spec.name}: shape {spec.shape}, expected 0 to 3 axes of at least 1")
