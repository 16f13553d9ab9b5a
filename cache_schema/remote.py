"""Stores on servers: read through a mirror from S3, GCS, Azure and http(s); published to the first three."""

from pathlib import Path

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.mirror import open_mirror
from molkd.cache_schema.objects import is_url
from molkd.cache_schema.publishing import publish

__all__ = ["is_url", "local_root", "open_mirror", "publish", "writable_root"]


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
