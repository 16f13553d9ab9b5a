"""Validation of JSON documents that reports every problem at once, each with its place."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.errors import IntegrityError
from molkd.cache_schema.untrusted import SHOWN, brief

_HEX = frozenset("0123456789abcdef")
_LOWER_HEX = re.compile("[0-9a-f]*")
_MAX_PROBLEMS_SHOWN = 5
_SHOWN_MESSAGE = 500  # characters


class Checks:
    """Collects problems while a document is taken apart; a wrong value is replaced by a harmless one."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[str] = []

    def problem(self, place: str, message: str) -> None:
        """Note a problem."""
        self.problems.append(f"{place[:SHOWN]}: {message[:_SHOWN_MESSAGE]}")

    def integer(self, document: dict[str, Any], key: str, low: int, high: int, at: str = "") -> int:
        """Return an integer in [low, high]."""
        value = document.get(key)
        if type(value) is not int or not low <= value <= high:
            self.problem(f"{at}{key}", f"{brief(value)} is no integer from {low} to {high}")
            return low
        return value

    def number(self, document: dict[str, Any], key: str, at: str = "") -> float:
        """Return a finite number that is not negative."""
        value = document.get(key)
        if type(value) not in (int, float) or not 0 <= value < float("inf"):  # type: ignore[operator]
            self.problem(f"{at}{key}", f"{brief(value)} is no finite number from 0 up")
            return 0.0
        return float(value)  # type: ignore[arg-type]

    def numbers(self, document: dict[str, Any], key: str, length: int, at: str = "") -> NDArray[np.float64]:
        """Return a list of finite numbers as an array (length,)."""
        value = document.get(key)
        if isinstance(value, list) and len(value) == length and all(type(v) in (int, float) for v in value):
            array = np.array(value, dtype=np.float64)
            if np.isfinite(array).all():
                return array
        self.problem(f"{at}{key}", f"no list of {length} finite numbers")
        return np.zeros(length)

    def text(self, document: dict[str, Any], key: str, at: str = "") -> str:
        """Return a text."""
        value = document.get(key)
        if not isinstance(value, str):
            self.problem(f"{at}{key}", f"{brief(value)} is no text")
            return ""
        return value

    def hexadecimal(self, document: dict[str, Any], key: str, digits: int, at: str = "") -> str:
        """Return a text of lower-case hex digits."""
        value = document.get(key)
        if not is_hex(value, digits):
            self.problem(f"{at}{key}", f"{brief(value)} is not {digits} hex digits")
            return "0" * digits
        return str(value)

    def table(self, document: dict[str, Any], key: str, at: str = "") -> dict[str, Any]:
        """Return a dictionary."""
        value = document.get(key)
        if not isinstance(value, dict):
            self.problem(f"{at}{key}", "no JSON object")
            return {}
        return value

    def checksums(self, document: dict[str, Any], key: str, n: int, at: str = "") -> bytes:
        """Return a list of n checksums of 8 hex digits as bytes, four each."""
        values = document.get(key)
        packed = values if isinstance(values, bytes) else pack_checksums(values)
        if packed is None or len(packed) != 4 * n:
            self.problem(f"{at}{key}", f"no list of {n} checksums")
            return bytes(4 * n)
        return packed

    def items(self, document: dict[str, Any], key: str, at: str = "") -> list[Any]:
        """Return a list."""
        value = document.get(key)
        if not isinstance(value, list):
            self.problem(f"{at}{key}", "no list")
            return []
        return value

    def hex_table(self, document: dict[str, Any], key: str, digits: int, at: str = "") -> dict[str, str]:
        """Return a dictionary of checksums."""
        table = self.table(document, key, at)
        return {name: self.hexadecimal(table, name, digits, f"{at}{key}.") for name in table}

    def finish(self, remedy: str) -> None:
        """Raise if there were problems.

        Raises
        ------
        IntegrityError
            Naming the file and the problems found.
        """
        if self.problems:
            shown = "; ".join(self.problems[:_MAX_PROBLEMS_SHOWN])
            more = len(self.problems) - _MAX_PROBLEMS_SHOWN
            raise IntegrityError(f"{self.where}: {shown}{f'; and {more} more' if more > 0 else ''}; {remedy}")


def is_hex(value: object, digits: int) -> bool:
    """Say whether a value is a text of so many lower-case hex digits."""
    return isinstance(value, str) and len(value) == digits and set(value) <= _HEX


def pack_checksums(values: object) -> bytes | None:
    """Return a list of checksums of 8 hex digits as bytes, four each; None if it is anything else."""
    if not isinstance(values, list):
        return None
    try:
        joined = "".join(values)
    except TypeError:
        return None
    is_sound = set(map(len, values)) <= {8} and _LOWER_HEX.fullmatch(joined)
    return bytes.fromhex(joined) if is_sound else None
