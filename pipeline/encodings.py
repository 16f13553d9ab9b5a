"""Which encoding each signal takes, and codebooks fitted to the first systems of a store."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.codebook import Codebook, decode_rows, encode_rows, is_vector, pca_bytes
from molkd.cache_schema.encoding import ENCODINGS, encoding_for, finite_rows, is_fitted
from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.fitting import ENOUGH_ATOMS, calibration_systems, fit_codebook
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.writer import Store
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.encoding_options import parse_encodings
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.teacher_pass import TeacherPass, make_work

log = logging.getLogger(__name__)

_MOST_ROWS = 50_000  # to fit to: a system may have a hundred times as many edges as atoms
CHOOSE = ""  # the encoding is to be found by its error


@dataclass(frozen=True)
class Fitted:
    """An encoding that fits a signal, and its relative rms error where it was measured."""

    encoding: str
    codebook: Codebook | None


def asked_encodings(
    specs: Mapping[str, FieldSpec], config: CacheConfig, n_atoms: int, known: Mapping[str, str]
) -> dict[str, str]:
    """Return signal -> encoding as asked for, `CHOOSE` where --max-error is to choose.

    Energies and forces keep their precision, whatever is asked for the rest. What nothing is said about is
    stored as it is declared, or else in int8; in half precision if there is too little to fit a codebook to.

    Parameters
    ----------
    n_atoms : of the store
    known : signal -> encoding, of signals that the store has already

    Raises
    ------
    ConfigError
        If an encoding is unknown, or named for a signal that is not stored or keeps its precision.
    """
    general, named = parse_encodings(config.encoding, specs)
    for name, encoding in named.items():
        exact = encoding_for(specs[name], encoding)
        if exact != encoding:
            raise ConfigError(
                f"--encoding {name}={encoding}: {name} is stored in {exact}, only features may be narrower; "
                "leave it out"
            )
    default = general or (CHOOSE if config.max_error is not None else None)
    encodings = {}
    for name, spec in specs.items():
        usual = known.get(name, "int8" if spec.shape and n_atoms >= ENOUGH_ATOMS else "fp16")
        asked = named.get(name, default)
        encodings[name] = encoding_for(spec, usual if asked is None else asked)
    return encodings


def warn_of_errors(cache: Cache, teacher: str, signals: Iterable[str], max_error: float) -> None:
    """Log which signals are stored with a larger relative error than `max_error`.

    Those that were stored before are among them, or what a sample showed does not hold for the whole.
    """
    for name in signals:
        entry = cache.teachers[teacher].signals[name]
        if encoding_for(entry.spec, CHOOSE) == CHOOSE and entry.relative_error > max_error:
            log.warning(
                "%s is stored in %s with a relative error of %.2g, more than --max-error %.2g; for a smaller "
                "one store it anew, under another --name",
                name, entry.encoding, entry.relative_error, max_error,
            )  # fmt: skip


def settle_encodings(
    teacher_pass: TeacherPass, store: Store, name: str, asked: Mapping[str, str], config: CacheConfig
) -> dict[str, Fitted]:
    """Return for each signal the encoding to declare; what the store has already is not fitted again.

    The teacher looks at the first systems of the store, a random sample that depends on nothing else, so that
    any process finds the same.

    Parameters
    ----------
    asked : as `asked_encodings`

    Raises
    ------
    TeacherError, CacheError
        As the pass itself, or if there is nothing to fit to.
    """
    settled: dict[str, Fitted] = {}
    for signal, encoding in asked.items():
        known = store.find_signal(name, signal)
        if known is not None and encoding in (CHOOSE, known.encoding):
            settled[signal] = Fitted(known.encoding, known.codebook)
        elif encoding != CHOOSE and not is_fitted(encoding):
            settled[signal] = Fitted(encoding, None)
    open_ones = tuple(signal for signal in asked if signal not in settled)
    if open_ones:
        sample = calibration_systems(teacher_pass.cache.system_n_atoms)
        values, system = _compute(teacher_pass, sample, open_ones, config)
        for signal in open_ones:
            spec = teacher_pass.teacher.signals[signal]
            settled[signal] = _fit(values[signal], system[signal], spec, asked[signal], len(sample), config)
    return {signal: settled[signal] for signal in asked}


def _compute(
    teacher_pass: TeacherPass, systems: NDArray[np.int64], signals: tuple[str, ...], config: CacheConfig
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.int64]]]:
    """Return finite rows of each signal by system, about `_MOST_ROWS` of them, and the system of each row."""
    log.info("fitting the encodings of %s to the first %d systems", ", ".join(signals), len(systems))
    teacher = teacher_pass.teacher
    rows: dict[str, list[NDArray[np.float32]]] = {s: [] for s in signals}
    owners: dict[str, list[NDArray[np.int64]]] = {s: [] for s in signals}
    atoms, edges = config.budget(teacher.device.type)
    n_atoms = teacher_pass.cache.system_n_atoms[systems].astype(np.int64)
    quota = -(-_MOST_ROWS * n_atoms // n_atoms.sum())  # rows of each system, which are its share of atoms
    works = make_work(teacher_pass.cache, systems, teacher.neighbor_rule, teacher.dtype, atoms, edges)
    for work in works:
        for part, out in teacher_pass.run(work, signals):
            per_atom = np.repeat(part.indices, part.n_atoms)
            for s in signals:
                values = out[s].float().cpu().numpy()
                axis = teacher.signals[s].axis
                of_edges = out["edge_index"][1].cpu().numpy() if axis == "edge" else slice(None)
                owner = part.indices if axis == "system" else per_atom[of_edges]
                order = np.argsort(owner, kind="stable")  # those of edges may come in any order
                order = order[finite_rows(values)[order]]
                order = order[_spread(owner[order], quota)]
                rows[s].append(values[order])
                owners[s].append(owner[order])
    return (
        {s: np.concatenate(r) for s, r in rows.items()},
        {s: np.concatenate(o) for s, o in owners.items()},
    )


def _spread(system: NDArray[np.int64], quota: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which rows to keep (n,), as many of each system as its quota (S,) allows, evenly spread."""
    n_rows = np.bincount(system, minlength=len(quota))
    row = np.arange(len(system)) - (np.cumsum(n_rows) - n_rows)[system]  # within its system
    n, most = n_rows[system], np.minimum(n_rows, quota)[system]
    kept: NDArray[np.bool_] = (row + 1) * most // n > row * most // n
    return kept


def _fit(
    values: NDArray[np.float32],
    system: NDArray[np.int64],
    spec: FieldSpec,
    asked: str,
    n_systems: int,
    config: CacheConfig,
) -> Fitted:
    """Fit what was asked for, or what is found to be good enough on systems it was not fitted to."""
    if asked == CHOOSE:
        # What is fitted to the systems of one half is measured on those of the other.
        asked = choose_encoding(values, spec, config.max_error or 0.0, int((system < n_systems // 2).sum()))
    return Fitted(asked, fit_codebook(values, spec, asked, n_systems) if is_fitted(asked) else None)


def choose_encoding(
    values: NDArray[np.float32], spec: FieldSpec, max_error: float, n_fitted: int | None = None
) -> str:
    """Return the smallest encoding whose relative error, on rows it is not fitted to, is within `max_error`.

    Parameters
    ----------
    values : (n, *shape), systems one after the other
    n_fitted : rows to fit to; the first half if None
    """
    cut = len(values) // 2 if n_fitted is None else n_fitted
    for encoding in reversed(ladder(spec)):
        error = held_out_error(values, spec, encoding, cut)
        if error <= max_error:
            log.info("%s: %s, relative error %.2g", spec.name, encoding, error)
            return encoding
    return "fp32"  # there are no rows


def held_out_error(values: NDArray[np.float32], spec: FieldSpec, encoding: str, n_fitted: int) -> float:
    """Return the relative error of an encoding, infinite where it cannot hold a value, NaN without rows.

    A plain encoding is not fitted to any rows: its error is that of all.
    """
    if not len(values) or (is_fitted(encoding) and not 0 < n_fitted < len(values)):
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):
        if is_fitted(encoding):
            book = fit_codebook(values[:n_fitted], spec, encoding, 0)
            values = values[n_fitted:]
            read = decode_rows(*encode_rows(values, book), book)
        else:
            read = values.astype(ENCODINGS[encoding].dtype)
        return relative_error(values, read, spec)


def ladder(spec: FieldSpec) -> list[str]:
    """Return the encodings that a signal of features may have, the widest and most exact first."""
    channels = spec.shape[-1] if spec.shape else 0
    rotated = [f"pca:{channels // share}" for share in (1, 2, 4, 8) if channels >= share]
    return ["fp32", "fp16", *rotated[:1], *(["int8"] if channels else []), *rotated[1:]]


def narrower(spec: FieldSpec, encoding: str) -> str | None:
    """Return the next encoding of the ladder that takes less room; None if there is none."""
    now = row_bytes(spec, encoding)
    return next((e for e in ladder(spec) if row_bytes(spec, e) < now), None)


def row_bytes(spec: FieldSpec, encoding: str) -> int:
    """Return the bytes on disk of one row; of one in a fitted encoding, with its scale."""
    if is_fitted(encoding):
        channels = spec.shape[-1]
        # A rotation has a component a channel, and none takes more than 16 bits.
        codes = channels if encoding == "int8" else min(pca_bytes(encoding), 2 * channels)
        return int(np.prod(spec.shape[:-1], dtype=int)) * codes + np.dtype(np.float16).itemsize
    return int(np.dtype(ENCODINGS[encoding].dtype).itemsize * np.prod(spec.shape, dtype=int))


def relative_error(values: NDArray[np.floating], read: NDArray[np.floating], spec: FieldSpec) -> float:
    """Return the rms error of rows as read over the rms deviation from their mean (vectors: from zero)."""
    error = read.astype(np.float64) - values
    if not np.isfinite(error).all():
        return float("inf")
    mean = 0.0 if is_vector(spec) else values.mean(axis=0, dtype=np.float64)
    return float(np.sqrt((error**2).mean() / max(((values - mean) ** 2).mean(), np.finfo(float).tiny)))
