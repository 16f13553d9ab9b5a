"""A mirror: the local folder of a remote store, into which its files come when they are first used."""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.expected_files import PUBLISH, ExpectedFiles
from molkd.cache_schema.files import exclusive, inside, make_folder, on_first_use, write_error, write_file
from molkd.cache_schema.jsonfile import parse_sealed
from molkd.cache_schema.layout import (
    DATA,
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_MANIFEST_BYTES,
    PLAN,
    SUFFIX,
)
from molkd.cache_schema.mirror_space import MirrorSpace, mirrors_folder, mirrors_limit
from molkd.cache_schema.objects import AT_ONCE, Expected, Remote
from molkd.cache_schema.plan import Plan, read_plan
from molkd.cache_schema.server import check_relative
from molkd.cache_schema.state import Manifest, read_manifest

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 60.0
_MIRRORS: dict[Path, "Mirror"] = {}  # by folder


class Mirror:
    """Knows what each file of a remote store must be, and fetches those that are not there."""

    def __init__(
        self, remote: Remote, root: Path, plan: Plan, manifest: Manifest, space: MirrorSpace
    ) -> None:
        self.remote, self.root, self._space = remote, root, space
        self.expected = ExpectedFiles(remote.at(MANIFEST), root, plan, manifest)
        self._seen: set[str] = set()  # files that were here once; they may have had to make room since
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by file
        self._n_fetched, self._bytes_fetched, self._last_line = 0, 0, time.monotonic()
        self._counting = threading.Lock()

    def fetch_small(self) -> None:
        """Bring metadata and the systems table up to date: all that opening a store needs."""
        self._together(self._renew, self.expected.small)

    def fetch_ahead(self, relatives: Iterable[str]) -> None:
        """Bring several files at once that are going to be read one after the other."""
        unseen = set(relatives) - self._seen
        if len(unseen) > 1:
            self._together(lambda relative: inside(self.root, relative), sorted(unseen))

    def forget(self, relative: str) -> None:
        """Remove a fetched file; it comes again when it is used."""
        (self.root / check_relative(relative, str(self.root))).unlink(missing_ok=True)

    def bring(self, relative: str, path: Path) -> None:
        """Fetch a file of the store unless it is there; what the manifest does not name is left alone.

        Raises
        ------
        CacheError, IntegrityError
            As `Remote.fetch`.
        """
        expected = self.expected.of(relative)
        if expected is None:
            return
        with self._fetching[relative]:
            try:
                is_here = expected.n_bytes in (None, path.stat().st_size)
            except FileNotFoundError:
                is_here = False
            if is_here:
                with contextlib.suppress(OSError):  # removed just now, or another user's
                    os.utime(path)  # what was used longest ago makes room for new files
            else:
                self._fetch(relative, path, expected)
        self._seen.add(relative)

    def _fetch(self, relative: str, path: Path, expected: Expected) -> None:
        self._space.reserve(expected.n_bytes or 0)
        n_bytes = self.remote.fetch(relative, path, expected)
        with self._counting:
            self._n_fetched += 1
            self._bytes_fetched += n_bytes
            now = time.monotonic()
            if now - self._last_line < _SECONDS_BETWEEN_LINES:
                return
            self._last_line = now
        log.info("%s: %d files, %.3g GB fetched", self.remote.url, self._n_fetched, self._bytes_fetched / 1e9)

    def _renew(self, relative: str) -> None:
        path, expected = inside(self.root, relative), self.expected.small[relative]
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == expected.sha256:
            return
        self._fetch(relative, path, expected)

    def _together(self, act: Any, relatives: Iterable[str]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for _ in pool.map(act, relatives):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def open_mirror(url: str) -> Path:
    """Return a local folder through which a finished remote store is read; files come on first use.

    Raises
    ------
    CacheError
        If there is no store, it is not finished, or the server cannot be asked.
    IntegrityError
        If what the server sends is damaged, or names files outside the store.
    """
    remote = Remote(url)
    with ThreadPoolExecutor(2) as pool:
        plan_raw, manifest_raw = pool.map(remote.read, (PLAN, MANIFEST), (MAX_JSON_BYTES, MAX_MANIFEST_BYTES))
    if plan_raw is None:
        raise CacheError(f"{remote.url}: not a store (no {PLAN} there); give the URL of a NAME{SUFFIX}")
    if manifest_raw is None:
        raise CacheError(
            f"{remote.url}: is not finished (no {MANIFEST} there), so nobody can tell what it holds; if it "
            "is being published wait for that, else finish the local store and publish it (kd cache copy)"
        )
    plan_sha256 = parse_sealed(plan_raw, remote.at(PLAN), PUBLISH)[1]
    document = parse_sealed(manifest_raw, remote.at(MANIFEST), PUBLISH)[0]
    digest = hashlib.sha256(f"{remote.url} {plan_sha256}".encode()).hexdigest()
    host = re.sub(r"[^A-Za-z0-9_.-]", "_", remote.host)
    base = mirrors_folder()
    root = base / f"{host}-{digest[:16]}" / remote.name
    try:
        make_folder(root)
        with exclusive(root.parent):  # one process at a time
            _forget_changed(root, document)
            for name, raw in ((PLAN, plan_raw), (MANIFEST, manifest_raw)):
                if not (root / name).is_file() or (root / name).read_bytes() != raw:
                    write_file(root / name, raw, replace=True)
    except OSError as error:
        raise write_error(root, error, len(plan_raw) + len(manifest_raw)) from error
    root = root.resolve()
    plan = read_plan(root)
    manifest = read_manifest(root, plan)
    assert manifest is not None
    mirror = Mirror(remote, root, plan, manifest, MirrorSpace(base.resolve(), mirrors_limit()))
    mirror.fetch_small()
    if root not in _MIRRORS:
        log.info("%s: read through %s", remote.url, root)
    _MIRRORS[root] = mirror
    on_first_use(root, mirror.bring)
    return root


def mirror_of(root: Path) -> Mirror | None:
    """Return the mirror that a folder is in this process."""
    return _MIRRORS.get(root)


def shown_place(root: Path) -> str:
    """Return what people know a store by: its folder, or its URL."""
    mirror = mirror_of(root)
    return str(root) if mirror is None else mirror.remote.url


def fetch_ahead(files: Iterable[tuple[Path, str]]) -> None:
    """Have the files (root of a store, path in it) fetched at once that lie in mirrors."""
    if not _MIRRORS:
        return
    by_root = defaultdict(set)
    for root, relative in files:
        by_root[root].add(relative)
    for root, relatives in by_root.items():
        if root in _MIRRORS:
            _MIRRORS[root].fetch_ahead(relatives)


def damage_remedy(root: Path, relative: str) -> str:
    """Return what to do about a file found damaged on the disk if it was fetched, else nothing."""
    mirror = mirror_of(root)
    if mirror is None:
        return ""
    mirror.forget(relative)
    return f"the copy of {mirror.remote.at(relative)} is removed; run the same command again to fetch it anew"


def _forget_changed(root: Path, document: dict[str, Any]) -> None:
    """Remove what was fetched of groups that have been published anew since."""
    try:
        old = parse_sealed((root / MANIFEST).read_bytes(), "", "")[0].get("groups", {})
    except FileNotFoundError:
        return
    except IntegrityError:
        shutil.rmtree(root / DATA, ignore_errors=True)
        return
    new = document.get("groups")
    for group, entry in old.items():
        if not isinstance(new, dict) or new.get(group) != entry:
            shutil.rmtree(inside(root, f"{DATA}/{check_relative(group, str(root))}"), ignore_errors=True)
