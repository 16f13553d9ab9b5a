"""Servers: what place a URL means, how it is reached, and errors of the network in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.layout import SUFFIX

if TYPE_CHECKING:
    from obstore.store import ObjectStore

BUCKETS = ("s3", "gs", "az")
SCHEMES = (*BUCKETS, "http", "https")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of the path of any file of a store
_SETTINGS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL, or "
    "AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY",
}


def is_url(text: str | Path) -> bool:
    """Say whether a text means a place on a server; a Path never does."""
    return isinstance(text, str) and _URL.match(text) is not None


class Server:
    """What lies below a URL.

    Attributes
    ----------
    url : without the slash at its end
    scheme : one of SCHEMES
    host : bucket, container or host
    name : last part of the URL, fit for a folder
    store : of the library; paths in it are relative to the URL
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise CacheError(f"{url}: no such kind of place; stores are read from {', '.join(SCHEMES)}")
        if parts.query or parts.fragment or "@" in parts.netloc or not parts.netloc:
            raise CacheError(
                f"{parts.scheme}://{parts.hostname or ''}{parts.path}: give scheme, host and path only, "
                f"{parts.scheme}://.../NAME{SUFFIX}; credentials come from the environment"
            )
        self.url, self.scheme, self.host = url.rstrip("/"), parts.scheme, parts.netloc
        last = unquote(parts.path).rstrip("/").rsplit("/", 1)[-1]
        self.name = re.sub(r"[^A-Za-z0-9_.-]", "_", last).lstrip(".") or f"store{SUFFIX}"
        self.store = _connect(self.url, self.scheme)
        self._pid = os.getpid()

    def at(self, relative: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{relative}"

    @contextmanager
    def asking(self, relative: str) -> Iterator[None]:
        """Turn the library's errors about a file into one line.

        Raises
        ------
        CacheError
            If the server cannot be reached or refuses.
        """
        from obstore.exceptions import BaseError

        if os.getpid() != self._pid:
            raise CacheError(
                f"{self.at(relative)}: cannot be reached from a forked process; start workers with spawn, or "
                "copy the store to a local folder first (kd cache copy)"
            )
        try:
            yield
        except (BaseError, OSError) as error:
            reason = _in_one_line(error)
            how = _SETTINGS.get(self.scheme)
            remedy = f" and the environment ({how})" if how else ""
            raise CacheError(
                f"{self.at(relative)}: {reason}; check the URL, the network{remedy}, then run the same "
                "command again"
            ) from error


def check_relative(relative: str, where: str) -> str:
    """Return the path of a file in a store if it is one that a store may have.

    Raises
    ------
    IntegrityError
        Naming where it was read.
    """
    if not all(_PART.fullmatch(part) for part in relative.split("/")):
        raise IntegrityError(f"{where}: names the file {relative!r}, which leads out of the store")
    return relative


def _in_one_line(error: Exception) -> str:
    """Return the reason of a failure; of an answer in XML the code and the message."""
    text = str(error)
    answer = [
        found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>([^<]*)</{tag}>", text))
    ]
    reason = ": ".join([text.partition("\n")[0].partition("<")[0].strip().rstrip(":"), *answer])
    return "".join(c if c.isprintable() else " " for c in reason)


def _connect(url: str, scheme: str) -> "ObjectStore":
    try:
        from obstore.exceptions import BaseError
        from obstore.store import HTTPStore, from_url
    except ImportError as error:
        raise CacheError(f"{url}: needs the extra s3; install it with pip install 'molkd[s3]'") from error

    endpoints = (value for name, value in os.environ.items() if name.startswith("AWS_ENDPOINT"))
    plain = scheme == "http" or any(e.startswith("http://") for e in endpoints)
    client: Any = {
        "allow_http": plain,
        "connect_timeout": timedelta(seconds=20),
        "read_timeout": timedelta(seconds=60),
        "timeout": timedelta(hours=6),  # of a whole file; what stalls ends with the read timeout
    }
    retry: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
    try:
        if scheme in BUCKETS:
            return from_url(url, client_options=client, retry_config=retry)
        return HTTPStore.from_url(url, client_options=client, retry_config=retry)
    except (BaseError, ValueError) as error:
        raise CacheError(f"{url}: {_in_one_line(error)}; check the URL") from error
