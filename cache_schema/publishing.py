"""Publish a finished store: its files become objects of a bucket, the manifest last."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molkd.cache_schema.crc import crc32c, crc_hex
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.files import inside
from molkd.cache_schema.groups import ATOMS, list_logged_teachers, list_signal_groups, list_teachers
from molkd.cache_schema.jsonfile import parse_sealed
from molkd.cache_schema.layout import (
    DATA,
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_MANIFEST_BYTES,
    PLAN,
    SUFFIX,
    record_path,
)
from molkd.cache_schema.objects import Remote
from molkd.cache_schema.plan import Plan, read_plan, read_systems, system_file
from molkd.cache_schema.server import BUCKETS
from molkd.cache_schema.state import Manifest, load_group, pack_record, read_manifest

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_AT_ONCE = 4  # files under way
_PIECE_BYTES = 1 << 24
_RESTORE = "restore the file from a copy of the store, or have the shard written again (kd cache verify)"


@dataclass(frozen=True)
class _Item:
    relative: str
    n_bytes: int
    crc32c: str = ""  # where a record says so
    sha256: str = ""  # where another file says so


@dataclass(frozen=True)
class PublishSummary:
    """What publishing has done."""

    url: str
    files: int
    bytes: int
    files_sent: int  # the others were there
    bytes_sent: int


def publish(store: str | Path, url: str, progress: Progress | None = None) -> PublishSummary:
    """Copy a finished local store to a bucket; running it again sends only what is not there yet.

    The plan goes first and is never replaced, so two stores cannot mix; the manifest goes last, and readers
    want it, so they see nothing or a whole store. Nothing is ever removed.

    Parameters
    ----------
    url : s3://BUCKET/PREFIX/NAME.kdcache, gs://..., az://...
    progress : called with bytes done and bytes in all

    Raises
    ------
    CacheError
        If the store is not finished, another one is there, or the server refuses.
    IntegrityError
        If a file of the store is missing or damaged; nothing becomes visible then.
    """
    root = Path(store)
    remote = Remote(url)
    if remote.scheme not in BUCKETS:
        raise CacheError(
            f"{url}: nothing can be written over {remote.scheme}; publish to {', '.join(BUCKETS)}, or put a "
            "copy of the store's folder where the web server finds it"
        )
    if remote.url == f"{remote.scheme}://{remote.host}":
        raise CacheError(
            f"{url}: is the bucket itself; give the store a name in it, {remote.url}/NAME{SUFFIX}"
        )
    plan = read_plan(root)
    manifest = _finished(root, read_manifest(root, plan))
    items = list(_items(root, plan, manifest))
    is_new = _claim(root, remote, plan, manifest)
    total = sum(item.n_bytes for item in items)
    n_sent = bytes_sent = done = 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            futures = {pool.submit(_send, root, remote, item, is_new): item for item in items}
            for future in as_completed(futures):
                item = futures[future]
                n_sent, bytes_sent = n_sent + future.result(), bytes_sent + future.result() * item.n_bytes
                done += item.n_bytes
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    raw = inside(root, MANIFEST).read_bytes()
    remote.send(MANIFEST, raw, crc_hex(crc32c(raw)))
    return PublishSummary(remote.url, len(items) + 2, total, n_sent, bytes_sent)


def _finished(root: Path, manifest: Manifest | None) -> Manifest:
    """Return the manifest if it names all that the store holds."""
    teachers = sorted({*list_teachers(root), *list_logged_teachers(root)})
    names = [ATOMS, *(group for teacher in teachers for group in list_signal_groups(root, teacher))]
    missing = [name for name in names if manifest is None or name not in manifest.groups]
    if manifest is None or missing:
        raise CacheError(
            f"{root}: {', '.join(missing)} not finished (not in {MANIFEST}); run the command that writes it "
            "again (or copy an overlay, which makes it self-contained: kd cache copy), then publish"
        )
    return manifest


def _claim(root: Path, remote: Remote, plan: Plan, manifest: Manifest) -> bool:
    """Put the plan where none is, or see that what is there may be continued; return whether it is new.

    Raises
    ------
    CacheError
        If another store is there, or one that has what this one does not.
    """
    raw = inside(root, PLAN).read_bytes()
    if remote.send(PLAN, raw, crc_hex(crc32c(raw)), replace=False):
        return True
    remedy = f"publish under another name, or remove everything below {remote.url}"
    there = remote.read(PLAN, MAX_JSON_BYTES)
    if there is None or parse_sealed(there, remote.at(PLAN), remedy)[1] != plan.sha256:
        raise CacheError(f"{remote.url}: holds another store (its plan differs from {root}); {remedy}")
    published = remote.read(MANIFEST, MAX_MANIFEST_BYTES)
    if published is not None:
        there_now, _ = parse_sealed(published, remote.at(MANIFEST), remedy, on_table=pack_record)
        groups = there_now.get("groups", {})
        lost = [n for n, entry in groups.items() if _stored(manifest.groups.get(n)) != _stored(entry)]
        if lost:
            raise CacheError(
                f"{remote.url}: holds {', '.join(lost)}, which {root} lacks or has with other values; "
                f"{remedy}, or merge the two first (kd cache merge)"
            )
    return False


def _stored(entry: Any) -> Any:
    """Return what a manifest says about a group without sums and errors, which copies may estimate anew."""
    if not isinstance(entry, dict):
        return entry
    return {name: _stored(value) for name, value in entry.items() if name != "sums"}


def _send(root: Path, remote: Remote, item: _Item, is_new: bool) -> bool:
    """Send a file unless it is there; return whether it was sent."""
    if item.crc32c and not is_new and remote.holds(item.relative, item.n_bytes, item.crc32c):
        return False
    path = inside(root, item.relative)
    crc, sha256 = 0, hashlib.sha256()
    try:
        with path.open("rb") as handle:
            while piece := handle.read(_PIECE_BYTES):
                crc = crc32c(piece, crc)
                if item.sha256:
                    sha256.update(piece)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; {_RESTORE}") from None
    found = crc_hex(crc)
    if found != (item.crc32c or found) or sha256.hexdigest() != (item.sha256 or sha256.hexdigest()):
        raise IntegrityError(f"{path}: damaged, its checksum is not the recorded one; {_RESTORE}")
    if not item.crc32c and not is_new and remote.holds(item.relative, item.n_bytes, found):
        return False
    return remote.send(item.relative, path, found)


def _items(root: Path, plan: Plan, manifest: Manifest) -> Iterator[_Item]:
    """Yield all files but plan and manifest, which do not change any more."""
    systems = read_systems(root, plan)
    metadata = {f"{DATA}/{name}": digest for name, digest in plan.metadata.items()}
    metadata |= {system_file(name): digest for name, digest in plan.systems.items()}
    for name in manifest.groups:
        group = load_group(root, plan, systems, name)
        state = manifest.state(root, plan, group)
        metadata |= {f"{DATA}/{file}": digest for file, digest in group.metadata.items()}
        for file in group.codebook_files:  # reading the group has compared them
            yield _Item(f"{DATA}/{file}", inside(root, f"{DATA}/{file}").stat().st_size)
        for shard, files in state.files.items():
            for array, record in files.items():
                yield _Item(group.layouts[array].file(shard), record.n_bytes, record.crc32c)
            if (path := inside(root, record_path(name, shard))).is_file():
                yield _Item(record_path(name, shard), path.stat().st_size)
    for relative, digest in metadata.items():
        path = inside(root, relative)
        yield _Item(relative, path.stat().st_size if path.is_file() else 0, sha256=digest)
