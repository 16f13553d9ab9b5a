"""What augmented systems were made from, so that copies of a held-out system are held out too.

A store of `kd augment` keeps this among the facts on its data, by the name of the source that its systems
have: ``parents[SOURCE] = {"ids": [...], "of": [...]}``, ids in hex, and for each `source_row` the place in
them of its parent, -1 for none. None instead says that parents are not known.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.identity import ID_BYTES
from molkd.cache_schema.reader import Cache
from molkd.pipeline.errors import CacheError

log = logging.getLogger(__name__)

PARENTS = "parents"  # key among the facts that a store keeps on its data
Facts = dict[str, Any]  # by source
_MAX_BYTES = 2_000_000  # of a source: they are in the store's plan, which is read whenever it is opened


def root_ids(cache: Cache) -> NDArray[np.uint8]:
    """Return for each system (S, 16) the id of what it was made from, its own if it was not made.

    Raises
    ------
    CacheError
        If what the store says of parents makes no sense.
    """
    roots: NDArray[np.uint8] = cache.ids.copy()
    for number, name in enumerate(cache.source_names):
        known = _facts(cache).get(name)
        if known is None:
            continue
        rows = np.flatnonzero(cache.source == number)
        ids, parent_of = _checked(cache, known)
        places = cache.source_row[rows]
        if ((places < 0) | (places >= len(parent_of))).any():
            raise _senseless(cache)
        parents = parent_of[places]
        has_one = parents >= 0
        roots[rows[has_one]] = ids[parents[has_one]]
    return roots


def knows_parents(cache: Cache) -> bool:
    """Say whether everything that was made from other systems says from which."""
    return all(known is not None for known in _facts(cache).values())


def parents_facts(source: str, parents: Sequence[str], roots: Mapping[str, str] | None) -> Facts:
    """Return the facts on one source, none if nothing in it was made from a system.

    Parameters
    ----------
    parents : the id in hex of what each system was made from, empty where from nothing
    roots : what parents were made from themselves, by id; None where that is not known
    """
    if roots is None:
        return {source: None} if any(parents) else {}
    oldest = [roots.get(name, name) for name in parents]
    ids = sorted(set(oldest) - {""})
    if not ids:
        return {}
    number = {name: k for k, name in enumerate(ids)}
    known = {"ids": ids, "of": [number.get(name, -1) for name in oldest]}
    if len(json.dumps(known)) > _MAX_BYTES:
        log.warning(
            "%s: too many systems to keep what each was made from: training will not know which stem from "
            "validation or test data, so make them from training data only",
            source,
        )
        return {source: None}
    return {source: known}


def parents_of_stores(sources: Mapping[str, Cache]) -> Facts:
    """Return the facts on stores that are read as sources themselves, by their names as such."""
    facts: Facts = {}
    for name, cache in sources.items():
        roots = roots_by_id(cache)
        if roots is None:
            facts[name] = None
            continue
        facts |= parents_facts(name, [roots.get(row.tobytes().hex(), "") for row in cache.ids], {})
    return facts


def roots_by_id(cache: Cache) -> dict[str, str] | None:
    """Return what systems were made from, both by id in hex; None where the store does not know it of all.

    Those that were not made are left out.
    """
    if not knows_parents(cache):
        return None
    pairs = zip(cache.ids, root_ids(cache), strict=True)
    return {i.tobytes().hex(): r.tobytes().hex() for i, r in pairs if (i != r).any()}


def merged_parents(caches: Sequence[Cache]) -> Facts:
    """Return the facts of stores that become one; sources of one name and other parents make them unknown."""
    merged: Facts = {}
    for cache in caches:
        facts = _facts(cache)
        for name in cache.source_names:
            mine = facts.get(name, {})
            merged[name] = mine if merged.setdefault(name, mine) == mine else None
    return {name: known for name, known in merged.items() if known != {}}


def _facts(cache: Cache) -> Facts:
    facts = cache.dataset.get(PARENTS, {})
    if not isinstance(facts, dict):
        raise _senseless(cache)
    return facts


def _checked(cache: Cache, known: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return ids (P, 16) and the parent of each row (R,)."""
    try:
        ids = np.frombuffer(bytes.fromhex("".join(known["ids"])), np.uint8).reshape(-1, ID_BYTES)
        parent_of = np.array(known["of"], dtype=np.int64).reshape(-1)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _senseless(cache) from None
    if len(parent_of) and not -1 <= parent_of.min() <= parent_of.max() < len(ids):
        raise _senseless(cache)
    return ids, parent_of


def _senseless(cache: Cache) -> CacheError:
    return CacheError(
        f"{cache.path}: what it says of the parents of its systems makes no sense; "
        "make it again with kd augment"
    )
