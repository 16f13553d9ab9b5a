"""Stores on servers: read through a mirror from S3, GCS, Azure and http(s); published to the first three."""

from collections.abc import Iterator
from pathlib import Path

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.mirror import open_mirror
from molkd.cache_schema.objects import Remote
from molkd.cache_schema.publishing import publish
from molkd.cache_schema.server import BUCKETS, is_url

__all__ = ["find_stores", "is_url", "local_root", "open_mirror", "publish", "writable_root"]


def local_root(store: str | Path) -> Path:
    """Return the folder through which a store is read: its own, or the mirror of a URL.

    Raises
    ------
    CacheError, IntegrityError
        As `open_mirror`.
    """
    return open_mirror(store) if isinstance(store, str) and is_url(store) else Path(store)


def writable_root(store: str | Path) -> Path:
    """Return the folder of a store that is going to be written to.

    Raises
    ------
    CacheError
        If it is on a server.
    """
    if is_url(store):
        raise CacheError(
            f"{store}: stores on servers are only read; copy it to a local folder first (kd cache copy), "
            "write there, and publish it again"
        )
    return Path(store)


def find_stores(url: str) -> Iterator[str]:
    """Yield the URLs of all stores in a bucket, or below a prefix of one; stores are not looked into.

    Raises
    ------
    CacheError
        If the server has no listings, or cannot be asked.
    """
    remote = Remote(url)
    if remote.scheme not in BUCKETS:
        raise CacheError(f"{url}: a web server has no listings; name the store itself (kd cache info)")
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        folders, files = remote.entries(folder)
        if f"{folder}/{PLAN}".lstrip("/") in files:
            yield remote.at(folder).rstrip("/")
        else:
            waiting += sorted(folders, reverse=True)
