"""Files of a store put back in place: whole and checked first, then renamed; what is intact is left alone."""

import logging
import os
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path

from molkd.cache_schema.commit import Commit, FileRecord
from molkd.cache_schema.crc import crc32c, crc_hex
from molkd.cache_schema.edges import EdgeShardWriter
from molkd.cache_schema.errors import CacheError, ConflictError, IntegrityError
from molkd.cache_schema.fields import N_EDGES
from molkd.cache_schema.files import (
    fsync_folder,
    inside,
    make_folder,
    open_temporary,
    sweep,
    write_file,
)
from molkd.cache_schema.groups import require_unchanged
from molkd.cache_schema.jsonfile import seal
from molkd.cache_schema.layout import MANIFEST, record_path
from molkd.cache_schema.overlay import base_of
from molkd.cache_schema.plan import read_plan, read_systems
from molkd.cache_schema.shard_writer import ShardWriter
from molkd.cache_schema.untrusted import is_hollow, open_regular
from molkd.cache_schema.writer import Store

log = logging.getLogger(__name__)

ASIDE = ".damaged-"  # names of what stood where a file belongs and is none; no reader looks at them
_PIECE_BYTES = 1 << 22
_NAME_BYTES = 255


class OtherValuesError(ConflictError):
    """Values that would have to be those that a shard had, and are not."""


def clear_way(root: Path, relative: str) -> Path:
    """Return the path of a file that is going to be put there; what stands in its way is moved aside.

    That is a link, a file in the place of a folder, or anything but a file in its own.

    Raises
    ------
    IntegrityError
        If the name itself leads out of the store, or a folder is a link to another one of the store.
    """
    parts = relative.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise IntegrityError(
            f"{root / relative}: leads out of the store; no store of molkd names such a file"
        )
    path = root.resolve()
    for k, part in enumerate(parts):
        path = path / part
        is_last = k == len(parts) - 1
        if path.is_symlink() and not is_last and _is_inside(root, "/".join(parts[: k + 1])):
            raise IntegrityError(
                f"{path}: a link to another folder of the store; put the folder itself here, repair again"
            )
        in_place = path.is_file() if is_last else path.is_dir()
        if path.is_symlink() or (path.exists() and not in_place):
            path.rename(path.with_name(f"{ASIDE}{secrets.token_hex(4)}-{part}"[:_NAME_BYTES]))
    return path


def is_whole(path: Path, record: FileRecord) -> bool:
    """Say whether a file is there with the bytes that its record says."""
    try:
        if not path.is_file() or path.stat().st_size != record.n_bytes:
            return False
        total = 0
        with os.fdopen(open_regular(path), "rb") as handle:
            if is_hollow(handle.fileno()):
                return False
            while piece := handle.read(_PIECE_BYTES):
                total = crc32c(piece, total)
    except OSError:  # of a failing disk
        return False
    return crc_hex(total) == record.crc32c


class Replacement:
    """A copy of a file beside the place where it belongs, that takes the place when it is told to."""

    def __init__(self, source: Path, target: Path, record: FileRecord) -> None:
        self.target = target
        make_folder(target.parent)
        sweep(target.parent)
        if not source.is_file() or source.stat().st_size != record.n_bytes:
            raise IntegrityError(f"{source}: missing, or not of {record.n_bytes} bytes")
        self.temporary, fd = open_temporary(target)
        try:
            total = 0
            with os.fdopen(open_regular(source), "rb") as reading, os.fdopen(fd, "wb") as writing:
                while piece := reading.read(_PIECE_BYTES):
                    total = crc32c(piece, total)
                    writing.write(piece)
                writing.flush()
                os.fsync(writing.fileno())
            if crc_hex(total) != record.crc32c:
                raise IntegrityError(f"{source}: damaged, its crc32c is not the recorded one")
        except BaseException:
            self.discard()
            raise

    def take_place(self) -> None:
        """Replace what is there."""
        self.temporary.replace(self.target)
        fsync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove the copy unless it has taken its place."""
        self.temporary.unlink(missing_ok=True)


def forget_shard(root: Path, group: str, shard: int) -> None:
    """Uncommit a shard: first the manifest goes, which may say that it is finished, then the record."""
    for relative in (MANIFEST, record_path(group, shard)):
        path = clear_way(root, relative)
        if path.exists():
            path.unlink()
            fsync_folder(path.parent)


class _Mending(ShardWriter):
    """Puts a shard's files where they are missing or damaged, whether or not the shard is committed."""

    reference: dict[str, str] | None = None  # array -> crc32c that the shard had
    is_exact = False  # whether other values than those of `reference` are refused
    refused: set[tuple[str, int]]  # (group, shard) of those that were

    def _place(self, commit: Commit, record: Path) -> None:
        known = self._intact()
        require_unchanged(self._root, self._group)
        if self.reference not in (None, commit.checksums):
            if self.is_exact:
                self.refused.add((self._group.name, self.shard))
                raise OtherValuesError(f"{self._where}: the values given are not those that were stored")
            log.warning(
                "%s: the values computed now differ from those stored before, as on another device or with "
                "other batches; the whole shard is written anew", self._where,
            )  # fmt: skip
            forget_shard(self._root, self._group.name, self.shard)
            known = None
        for name, file in self._files.items():
            if not is_whole(file.target, commit.files[name]):
                file.temporary.replace(file.target)
                fsync_folder(file.target.parent)
        if known is None or known.checksums != commit.checksums:
            write_file(record, seal(commit.to_json()), replace=True)

    def _intact(self) -> Commit | None:
        try:
            return self._committed()
        except CacheError:
            return None


class _ShardMender(_Mending):
    """Of a group on atoms or systems."""


class _EdgeShardMender(_Mending, EdgeShardWriter):
    """Of a signal on edges."""


class MendingStore(Store):
    """A store whose writers replace what is damaged.

    Attributes
    ----------
    references : (group, shard) -> array -> crc32c of the files that the shard had, where that is known
    exact : groups of which other values are refused
    refused : (group, shard) of which other values were refused
    """

    references: Mapping[tuple[str, int], dict[str, str]]
    exact: frozenset[str] = frozenset()
    refused: set[tuple[str, int]]

    @classmethod
    def of(
        cls, root: Path, references: Mapping[tuple[str, int], dict[str, str]], exact: Collection[str] = ()
    ) -> "MendingStore":
        """Open the store in a folder; nothing but plan and systems table has to be whole."""
        plan = read_plan(root)
        store = cls(root, "a", plan, read_systems(root, plan), None, base_of(root, plan))
        store.references, store.exact, store.refused = references, frozenset(exact), set()
        return store

    def shard_writer(self, group: str, shard: int) -> ShardWriter:
        """Return a context manager that writes one shard and puts its files where they are not intact."""
        self._require_writable()
        loaded = self._load(group)
        for relative in (record_path(group, shard), *(x.file(shard) for x in loaded.layouts.values())):
            clear_way(self.path, relative)
        kind = _EdgeShardMender if N_EDGES.name in loaded.layouts else _ShardMender
        writer = kind(self.path, self.plan, self.systems, loaded, shard)
        writer.reference = self.references.get((group, shard))
        writer.is_exact, writer.refused = group in self.exact, self.refused
        return writer


def _is_inside(root: Path, relative: str) -> bool:
    try:
        return inside(root, relative).is_dir()
    except IntegrityError:
        return False
