"""When two teachers are the same: by what changes their output, not by dates, hosts or taps."""

from pathlib import Path
from typing import Any

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.groups import teacher_provenance
from molkd.cache_schema.jsonfile import canonical

TEACHER_IDENTITY = (
    "weights_sha256",
    "architecture",
    "config",
    "neighbor_rule",
    "precision",
    "energy_reference",
)


def identity(provenance: dict[str, Any]) -> str:
    """Return a text that is equal for equal teachers."""
    return canonical([provenance.get(key) for key in TEACHER_IDENTITY])


def require_same(root: Path, name: str, provenance: dict[str, Any]) -> None:
    """Refuse another teacher of a name that a store knows.

    Raises
    ------
    CacheError
        Saying what differs.
    """
    differs = differences(teacher_provenance(root, name) or {}, provenance)
    if differs:
        raise CacheError(
            f"{root}: its teacher {name} is another one ({differs}); "
            "give this one another name, or take the teacher the store was made with"
        )


def differences(known: dict[str, Any], given: dict[str, Any]) -> str:
    """Return in words what makes two teachers different ones; empty if they are the same."""
    differs = [k for k in TEACHER_IDENTITY if canonical(known.get(k)) != canonical(given.get(k))]
    return "; ".join(f"{k} {short(known.get(k))}, given {short(given.get(k))}" for k in differs)


def short(value: object) -> str:
    """Return a value as text, the end of a long one left out."""
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 20 else f"{text[:16]}..."
