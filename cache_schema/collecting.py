"""A new store for systems of other stores: its plan, and its signals with the encoding they get there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.codebook import Codebook, pca_bytes
from molkd.cache_schema.creation import LABELS_SHA256
from molkd.cache_schema.encoding import ENCODINGS, finite_rows, is_fitted
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.fitting import calibration_systems, fit_codebook
from molkd.cache_schema.groups import ATOMS
from molkd.cache_schema.identity import labels_digest, labels_fingerprint
from molkd.cache_schema.layout import split_signal_group
from molkd.cache_schema.regroup import Origins, carried_codebook, pieces, read_rows
from molkd.cache_schema.signal import Signal
from molkd.cache_schema.statistics import Moments
from molkd.cache_schema.writer import Store, create_store

_MOST_FIT_BYTES = 512 << 20  # of the values that a codebook is fitted to
_COLUMNS = ("id", "n_atoms", "energy", "cell", "pbc", "source_row")


@dataclass(frozen=True)
class Filling:
    """A group of a new store that is to be filled.

    Attributes
    ----------
    group : in the new store
    origins : where its rows come from
    names : of the group in each of these stores
    decode : whether values are encoded anew
    """

    group: str
    origins: Origins
    names: tuple[str, ...]
    decode: bool


def create_from(
    path: Path, origins: Origins, *, dataset: dict[str, Any], seed: int, rows_per_shard: int | None
) -> tuple[Store, Origins]:
    """Create a store for systems of other stores, or open the one that holds exactly them.

    Parameters
    ----------
    origins : in any order
    dataset, seed, rows_per_shard : as `create_store`

    Returns
    -------
    The store, and the origins in its order.

    Raises
    ------
    CacheError
        As `create_store`.
    """
    names = list(dict.fromkeys(name for cache in origins.caches for name in cache.source_names))
    source = np.empty(len(origins.index), np.int32)
    for k, places in origins.in_each(np.arange(len(origins.index))):
        cache = origins.caches[k]
        own = np.array([names.index(name) for name in cache.source_names])
        source[places] = own[cache.source[origins.index[places]]]
    columns = {name: gather(origins, name) for name in _COLUMNS}
    store = create_store(
        path,
        ids=columns.pop("id"),
        **columns,
        source=source,
        source_names=names,
        dataset=dataset,
        seed=seed,
        rows_per_shard=rows_per_shard,
    )
    order = store.input_index
    assert order is not None
    return store, replace(origins, cache=origins.cache[order], index=origins.index[order])


def gather(origins: Origins, name: str) -> NDArray[Any]:
    """Return a column of the systems tables, (S, ...), for the systems of `origins`."""
    first = getattr(origins.caches[0].systems, name)
    out = np.empty((len(origins.index), *first.shape[1:]), first.dtype)
    for k, places in origins.in_each(np.arange(len(out))):
        out[places] = getattr(origins.caches[k].systems, name)[origins.index[places]]
    return out


def describe_labels(origins: Origins) -> dict[str, Any]:
    """Return what a store's provenance says about the labels of its systems; all of them are read."""
    names = (ATOMS,) * len(origins.caches)
    energy, n_atoms = gather(origins, "energy"), gather(origins, "n_atoms").astype(np.int64)
    digests, n_with_forces = [], 0
    for part in pieces(np.arange(len(energy)), n_atoms, origins, names):
        rows = read_rows(origins, names, part, decode=False)
        ends = np.cumsum(n_atoms[part])
        for i, end in zip(part, ends, strict=True):
            own = {name: values[end - n_atoms[i] : end] for name, values in rows.items()}
            n_with_forces += bool(np.isfinite(own["forces"]).any())
            digests.append(labels_digest(float(energy[i]), own["forces"], own["tags"], own["fixed"]))
    return {
        "n_with_energy": int(np.isfinite(energy).sum()),
        "n_with_forces": n_with_forces,
        LABELS_SHA256: labels_fingerprint(gather(origins, "id"), digests),
    }


def declare(
    store: Store, teacher: str, origins: Origins, names: Sequence[str], encoding: str | None = None
) -> Filling:
    """Make room in a store for a signal that other stores hold.

    Rows go over as they are stored if all stores have the same encoding, with the same codebook, and no other
    is asked for. Else values are decoded and encoded again, a codebook is fitted to them anew.

    Parameters
    ----------
    teacher : its name in `store`
    origins, names : where the signal lies, and its group in each of the stores
    encoding : None keeps that of the stores

    Raises
    ------
    CacheError
        If the stores disagree about shape or encoding, the encoding asked for is not narrower, or the signal
        is there already, unfinished and differently encoded.
    """
    signals = [cache.state(name).group.signal for cache, name in zip(origins.caches, names, strict=True)]
    spec = _common_spec(origins, signals)
    found = list(dict.fromkeys(signal.encoding for signal in signals))
    if len(found) > 1 and encoding is None:
        raise CacheError(
            f"{_paths(origins)}: hold {spec.name} as {' and '.join(found)}; choose one: "
            f"--encoding {spec.name}={min(found, key=lambda e: row_bytes(spec, e))}"
        )
    wanted = encoding or found[0]
    first = signals[0]
    as_stored = found == [wanted] and all(_same_codebook(first.codebook, s.codebook) for s in signals)
    if as_stored:
        books = [signal.codebook for signal in signals if signal.codebook is not None]
        codebook = carried_codebook(origins, books) if books else None
        signal = Signal(spec, wanted, codebook, max((s.recoded_from for s in signals), key=len))
    else:
        widest = max(row_bytes(spec, e) for e in found)
        if found != [wanted] and row_bytes(spec, wanted) >= widest:
            raise CacheError(
                f"{_paths(origins)}: {spec.name} is stored as {' and '.join(found)}, {wanted} would be "
                "larger and no more exact; leave --encoding out, or choose a narrower one"
            )
        codebook = _codebook(store, teacher, spec, wanted, origins, names)
        signal = Signal(spec, wanted, codebook, _history(origins, signals, names))
    group = store.add_signal(teacher, spec, wanted, signal.codebook, signal.recoded_from)
    declared = store.signal(group)
    if store.missing_shards(group) and not (
        _same_codebook(declared.codebook, signal.codebook) and declared.recoded_from == signal.recoded_from
    ):
        raise CacheError(
            f"{store.path}: {group} is there, unfinished, with values from elsewhere; finish it with the "
            "command that began it, or choose another place for the copy"
        )
    return Filling(group, origins, tuple(names), decode=not as_stored)


def row_bytes(spec: FieldSpec, encoding: str) -> float:
    """Return the bytes of one row in an encoding, without its scale."""
    n_values = float(np.prod(spec.shape))
    if is_fitted(encoding):
        return n_values if encoding == "int8" else n_values / spec.shape[-1] * pca_bytes(encoding)
    return n_values * np.dtype(ENCODINGS[encoding].dtype).itemsize


def _common_spec(origins: Origins, signals: Sequence[Signal]) -> FieldSpec:
    spec = replace(signals[0].spec, max_per_atom=max(signal.spec.max_per_atom for signal in signals))
    for signal in signals:
        if replace(signal.spec, max_per_atom=spec.max_per_atom) != spec:
            raise CacheError(
                f"{_paths(origins)}: signal {spec.name} differs in shape or unit ({spec.shape} {spec.unit} "
                f"and {signal.spec.shape} {signal.spec.unit}); leave it out with --signals"
            )
    return spec


def _same_codebook(one: Codebook | None, other: Codebook | None) -> bool:
    """Say whether codes mean the same; how many systems were fitted does not matter."""
    if one is None or other is None:
        return one is other
    ours, theirs = one.arrays(), other.arrays()
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)


def _codebook(
    store: Store, teacher: str, spec: FieldSpec, encoding: str, origins: Origins, names: Sequence[str]
) -> Codebook | None:
    """Return the codebook to encode with: that of the store if it has one, else one fitted to the values."""
    if not is_fitted(encoding):
        return None
    known = store.find_signal(teacher, spec.name)
    if known is not None and known.same_as(spec, encoding):
        return known.codebook
    n_atoms = store.systems.n_atoms
    rows, n_bytes, n_systems = [], 0, 0
    for part in pieces(calibration_systems(n_atoms), n_atoms, origins, names):
        values = read_rows(origins, names, part, decode=True)["values"]
        rows.append(values[finite_rows(values)])
        n_bytes += values.nbytes
        n_systems = int(part[-1]) + 1
        if n_bytes > _MOST_FIT_BYTES:
            break
    return fit_codebook(np.concatenate(rows), spec, encoding, n_systems)


def _history(origins: Origins, signals: Sequence[Signal], names: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Return through which encodings the values went; of stores that differ, the longest way is told."""
    sums = Moments.empty(signals[0].spec)
    for cache, name in zip(origins.caches, names, strict=True):
        sums.merge(cache.state(name).moments["values"])
    last: dict[str, Any] = {"encoding": " and ".join(dict.fromkeys(signal.encoding for signal in signals))}
    if sums.count:
        last["error_rms"] = sums.error_rms
    return (*max((signal.recoded_from for signal in signals), key=len), last)


def _paths(origins: Origins) -> str:
    return ", ".join(str(cache.path) for cache in origins.caches)


def signal_of(group: str) -> str:
    """Return ``teacher/signal`` of a group, as summaries name it."""
    return "/".join(split_signal_group(group))
