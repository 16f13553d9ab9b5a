"""Commit records: one small sealed file a shard and group; what has none was never written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molkd.cache_schema.checks import Checks
from molkd.cache_schema.files import inside
from molkd.cache_schema.jsonfile import read_sealed
from molkd.cache_schema.layout import FORMAT, MAX_RECORD_BYTES, MAX_SYSTEMS, ArrayLayout, record_path
from molkd.cache_schema.plan import Plan, check_format
from molkd.cache_schema.statistics import Moments, n_channels

KIND = "molkd cache commit"
_FIXED_BYTES = 1 << 16
_NUMBER_BYTES = 28  # of a number, or of a checksum with its quotes


@dataclass(frozen=True)
class FileRecord:
    """One array's file of one shard."""

    n_bytes: int
    rows: int
    crc32c: str  # of the whole file, 8 hex digits
    chunk_crcs: bytes  # crc32c of every inner chunk stored, four bytes each, the highest first

    @property
    def n_chunks(self) -> int:
        """Inner chunks stored."""
        return len(self.chunk_crcs) // 4

    def chunk_crc32c(self, chunk: int) -> str:
        """Return the checksum of an inner chunk, 8 hex digits."""
        return self.chunk_crcs[4 * chunk : 4 * chunk + 4].hex()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "bytes": self.n_bytes,
            "rows": self.rows,
            "crc32c": self.crc32c,
            "chunk_crc32c": [self.chunk_crc32c(k) for k in range(self.n_chunks)],
        }


@dataclass(frozen=True)
class Commit:
    """The content of a commit record."""

    group: str
    shard: int
    files: dict[str, FileRecord]  # by array name
    moments: dict[str, Moments]  # of the floating-point arrays
    bad_systems: tuple[int, ...]  # stored indices of systems whose rows were given up
    host: str
    pid: int
    time: str  # ISO 8601, UTC
    weights_sha256: str  # of the teacher; empty for labels
    plan_sha256: str
    metadata: dict[str, str]  # zarr.json of the group within data.zarr -> sha256

    @property
    def checksums(self) -> dict[str, str]:
        """What makes two commits of the same shard equal."""
        return {name: f.crc32c for name, f in self.files.items()}

    @property
    def writer(self) -> str:
        """Who wrote it, in words."""
        return f"process {self.pid} on {self.host} at {self.time}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the seal."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "group": self.group,
            "shard": self.shard,
            "arrays": {
                name: {
                    **file.to_json(),
                    **({"sums": self.moments[name].to_json()} if name in self.moments else {}),
                }
                for name, file in self.files.items()
            },
            "bad_systems": list(self.bad_systems),
            "writer": {"host": self.host, "pid": self.pid},
            "time": self.time,
            "weights_sha256": self.weights_sha256,
            "plan_sha256": self.plan_sha256,
            "metadata": self.metadata,
        }


def rewrite_remedy(group: str, shard: int) -> str:
    """Say how to have one shard written again."""
    record = record_path(group, shard)
    return f"delete {record} and run the command that wrote it again; only that shard is redone"


def read_commit(
    root: Path,
    plan: Plan,
    group: str,
    shard: int,
    layouts: dict[str, ArrayLayout],
    rows: Mapping[str, int | None],
) -> Commit | None:
    """Read and check a commit record; None if the shard is not committed.

    Parameters
    ----------
    layouts : arrays of the group, by name
    rows : rows that the shard must have, by axis; None where only the record knows

    Raises
    ------
    IntegrityError
        If the record is damaged, of another store, or does not describe these arrays.
    """
    relative = record_path(group, shard)
    path = inside(root, relative)
    if not path.is_file():
        return None
    document, _ = read_sealed(path, max_bytes=_most_bytes(layouts, rows), remedy=rewrite_remedy(group, shard))
    return check_commit(document, root / relative, plan, group, shard, layouts, rows)


def _most_bytes(layouts: Mapping[str, ArrayLayout], rows: Mapping[str, int | None]) -> int:
    """Return more bytes than a record of these arrays can have."""
    total = _FIXED_BYTES + _NUMBER_BYTES * (rows["system"] or 0)  # bad systems
    for layout in layouts.values():
        n_rows = rows[layout.spec.axis]
        n_chunks = layout.stored_chunks(layout.rows_per_file if n_rows is None else n_rows)
        n_sums = 2 * n_channels(layout.values) if layout.values is not None else 0
        total += _NUMBER_BYTES * (n_chunks + n_sums)
    return min(total, MAX_RECORD_BYTES)


def check_commit(
    document: dict[str, Any],
    path: Path,
    plan: Plan,
    group: str,
    shard: int,
    layouts: dict[str, ArrayLayout],
    rows: Mapping[str, int | None],
) -> Commit:
    """Take the content of a commit record apart.

    Parameters
    ----------
    path : of the record, for messages
    plan, group, shard, layouts, rows : as `read_commit`

    Raises
    ------
    IntegrityError
        As `read_commit`.
    """
    remedy = rewrite_remedy(group, shard)
    check_format(document, KIND, path)
    check = Checks(str(path))
    if document.get("group") != group or document.get("shard") != shard:
        check.problem("group", f"describes shard {document.get('shard')} of {document.get('group')}")
    if document.get("plan_sha256") != plan.sha256:
        check.problem("plan_sha256", "belongs to another plan")
    arrays = check.table(document, "arrays")
    if set(arrays) != set(layouts):
        check.problem("arrays", f"expected exactly {', '.join(layouts)}")
        arrays = {}
    files = {name: file_record(check, arrays, name, layouts[name], rows) for name in arrays}
    check_edge_rows(check, files, layouts)
    sums = {n: moments(check, arrays[n], n, layouts[n]) for n in arrays if layouts[n].values is not None}
    writer = check.table(document, "writer")
    commit = Commit(
        group=group,
        shard=shard,
        files=files,
        moments=sums,
        bad_systems=bad_systems(check, document, plan),
        host=check.text(writer, "host", "writer."),
        pid=check.integer(writer, "pid", 0, 1 << 62, "writer."),
        time=check.text(document, "time"),
        weights_sha256=check.text(document, "weights_sha256"),
        plan_sha256=plan.sha256,
        metadata=check.hex_table(document, "metadata", 64),
    )
    check.finish(remedy)
    return commit


def file_record(
    check: Checks,
    arrays: dict[str, Any],
    name: str,
    layout: ArrayLayout,
    rows: Mapping[str, int | None],
) -> FileRecord:
    """Take a file's entry apart; problems go to `check`."""
    entry, at = check.table(arrays, name, "arrays."), f"arrays.{name}."
    known = rows[layout.spec.axis]
    low, high = (0, layout.rows_per_file) if known is None else (known, known)
    n_rows = check.integer(entry, "rows", low, high, at)
    size, n_chunks = layout.file_bytes(n_rows), layout.stored_chunks(n_rows)
    return FileRecord(
        n_bytes=check.integer(entry, "bytes", size, size, at),
        rows=n_rows,
        crc32c=check.hexadecimal(entry, "crc32c", 8, at),
        chunk_crcs=check.checksums(entry, "chunk_crc32c", n_chunks, at),
    )


def check_edge_rows(
    check: Checks, files: Mapping[str, FileRecord], layouts: Mapping[str, ArrayLayout]
) -> None:
    """Compare the rows of a shard's arrays on the edge axis; problems go to `check`."""
    rows = {name: file.rows for name, file in files.items() if layouts[name].spec.axis == "edge"}
    if len(set(rows.values())) > 1:
        check.problem("arrays", f"differ in their rows of edges: {rows}")


def moments(check: Checks, entry: dict[str, Any], name: str, layout: ArrayLayout) -> Moments:
    """Take the sums of an array apart; problems go to `check`."""
    at = f"arrays.{name}.sums."
    table = check.table(entry, "sums", f"arrays.{name}.") if isinstance(entry, dict) else {}
    assert layout.values is not None, layout.path
    n = n_channels(layout.values)
    return Moments(
        sum=check.numbers(table, "sum", n, at),
        sum_squares=check.numbers(table, "sum_squares", n, at),
        count=check.integer(table, "count", 0, 1 << 62, at),
        max_abs=check.number(table, "max_abs", at),
        error_max_abs=check.number(table, "error_max_abs", at),
        error_sum_squares=check.number(table, "error_sum_squares", at),
        **_held_out(check, table, at),
    )


def _held_out(check: Checks, table: dict[str, Any], at: str) -> dict[str, Any]:
    if "held_out_count" not in table:
        return {}
    names = ("held_out_error_max_abs", "held_out_error_sum_squares")
    return {"held_out_count": check.integer(table, "held_out_count", 0, 1 << 62, at)} | {
        name: check.number(table, name, at) for name in names
    }


def bad_systems(check: Checks, document: dict[str, Any], plan: Plan) -> tuple[int, ...]:
    """Take the list of given-up systems apart; problems go to `check`."""
    values = check.items(document, "bad_systems")
    if not all(type(v) is int and 0 <= v < min(plan.packing.n_systems, MAX_SYSTEMS) for v in values):
        check.problem("bad_systems", "no list of stored indices")
        return ()
    return tuple(values)
