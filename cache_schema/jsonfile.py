"""Sealed JSON: plan, commit records and manifest end with the sha256 of all their bytes before that line."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.layout import MAX_JSON_BYTES
from molkd.cache_schema.untrusted import parse_json, read_small

_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')
_SEAL_BYTES = len(b',\n "sha256": ""\n}\n') + 64


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text.

    Raises
    ------
    CacheError
        If the value holds something JSON cannot say: NaN, an array, an object of a class.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"provenance must be plain JSON values (text, numbers, lists, dictionaries): {error}"
        ) from error


def seal(document: dict[str, Any]) -> bytes:
    """Return the bytes of a sealed JSON file, one line a key."""
    lines = [f" {json.dumps(key)}: {canonical(document[key])}" for key in sorted(document)]
    body = ("{\n" + ",\n".join(lines)).encode()
    return body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def bounded(raw: bytes, what: str) -> bytes:
    """Return the bytes of a JSON file if readers take one of this size.

    Raises
    ------
    CacheError
        Naming what makes it so long.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise CacheError(
            f"{what}: {len(raw):,} bytes as JSON, at most {MAX_JSON_BYTES:,} are read; shorten it"
        )
    return raw


def read_sealed(
    path: Path, *, max_bytes: int, remedy: str, on_table: Callable[[dict[str, Any]], object] = bool
) -> tuple[dict[str, Any], str]:
    """Read a sealed file and return its content (without the seal) and its sha256.

    Parameters
    ----------
    on_table : as `parse_json`

    Raises
    ------
    IntegrityError
        If the file is cut off, larger than `max_bytes`, not JSON, or any bit differs from what was sealed.
    """
    return parse_sealed(read_small(path, max_bytes, remedy), str(path), remedy, max_bytes, on_table)


def parse_sealed(
    raw: bytes,
    where: str,
    remedy: str,
    max_bytes: int | None = None,
    on_table: Callable[[dict[str, Any]], object] = bool,
) -> tuple[dict[str, Any], str]:
    """Return the content (without the seal) and the sha256 of the bytes of a sealed file found at `where`.

    Raises
    ------
    IntegrityError
        As `read_sealed`.
    """
    found = _SEAL.search(raw, max(0, len(raw) - _SEAL_BYTES))
    if not found:
        raise IntegrityError(f"{where}: cut off or not written by molkd (no closing sha256 line); {remedy}")
    digest = hashlib.sha256(raw[: found.start()]).hexdigest()
    if digest != found[1].decode():
        raise IntegrityError(f"{where}: damaged (its sha256 differs); {remedy}")
    try:
        document = parse_json(raw, max_bytes, on_table)
    except ValueError as error:
        raise IntegrityError(f"{where}: not JSON ({error}); {remedy}") from error
    if not isinstance(document, dict):
        raise IntegrityError(f"{where}: no JSON object; {remedy}")
    del document["sha256"]
    return document, digest
