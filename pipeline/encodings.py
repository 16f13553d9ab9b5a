"""Which encoding each signal takes, and codebooks fitted to the first systems of a store."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.codebook import Codebook, decode_rows, encode_rows
from molkd.cache_schema.encoding import encoding_for, is_fitted
from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.fitting import calibration_systems, fit_codebook
from molkd.cache_schema.writer import Store
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.encoding_options import parse_encodings
from molkd.pipeline.teacher_pass import TeacherPass, make_work

log = logging.getLogger(__name__)

CHOOSE = ""  # the encoding is to be found by its error
_CODE_SHARES = (8, 4, 2, 1)  # bytes of a rotated row: channels divided by these


@dataclass(frozen=True)
class Fitted:
    """An encoding that fits a signal, and its relative rms error where it was measured."""

    encoding: str
    codebook: Codebook | None


def asked_encodings(specs: Mapping[str, FieldSpec], config: CacheConfig) -> dict[str, str]:
    """Return signal -> encoding as asked for, `CHOOSE` where --max-error is to choose.

    Energies and forces keep their precision, whatever is asked for the rest.

    Raises
    ------
    ConfigError
        If an encoding is unknown, or named for a signal that is not stored.
    """
    general, named = parse_encodings(config.encoding, specs)
    default = general or (CHOOSE if config.max_error is not None else "fp16")
    return {name: encoding_for(spec, named.get(name, default)) for name, spec in specs.items()}


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
    """Return the finite rows of each signal, and the system of each row."""
    log.info("fitting the encodings of %s to the first %d systems", ", ".join(signals), len(systems))
    teacher = teacher_pass.teacher
    rows: dict[str, list[NDArray[np.float32]]] = {s: [] for s in signals}
    owners: dict[str, list[NDArray[np.int64]]] = {s: [] for s in signals}
    atoms, edges = config.budget(teacher.device.type)
    works = make_work(teacher_pass.cache, systems, teacher.neighbor_rule, teacher.dtype, atoms, edges)
    for work in works:
        for part, out in teacher_pass.run(work, signals):
            per_atom = np.repeat(part.indices, part.n_atoms)
            for s in signals:
                values = out[s].float().cpu().numpy()
                axis = teacher.signals[s].axis
                of_edges = out["edge_index"][1].cpu().numpy() if axis == "edge" else slice(None)
                owner = part.indices if axis == "system" else per_atom[of_edges]
                finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
                rows[s].append(values[finite])
                owners[s].append(owner[finite])
    return (
        {s: np.concatenate(r) for s, r in rows.items()},
        {s: np.concatenate(o) for s, o in owners.items()},
    )


def _fit(
    values: NDArray[np.float32],
    system: NDArray[np.int64],
    spec: FieldSpec,
    asked: str,
    n_systems: int,
    config: CacheConfig,
) -> Fitted:
    if asked != CHOOSE:
        return Fitted(asked, fit_codebook(values, spec, asked, n_systems))
    assert config.max_error is not None
    fit_on = system < n_systems // 2
    for encoding in candidates(spec):
        half = fit_codebook(values[fit_on], spec, encoding, n_systems // 2)
        error = relative_error(values[~fit_on], half)
        if error <= config.max_error:
            log.info("%s: %s, relative error %.2g", spec.name, encoding, error)
            return Fitted(encoding, fit_codebook(values, spec, encoding, n_systems))
    encoding = "fp16" if config.max_error >= np.finfo(np.float16).eps else "fp32"
    log.info("%s: %s, no encoding in 8 bits or less is within %.2g", spec.name, encoding, config.max_error)
    return Fitted(encoding, None)


def candidates(spec: FieldSpec) -> list[str]:
    """Return the fitted encodings that may be chosen for a signal, the smallest first."""
    channels = spec.shape[-1]
    return [f"pca:{channels // share}" for share in _CODE_SHARES if channels >= share] + ["int8"]


def relative_error(values: NDArray[np.float32], codebook: Codebook) -> float:
    """Return the rms error of coded rows over the rms deviation from their mean (vectors: from zero)."""
    error = decode_rows(*encode_rows(values, codebook), codebook).astype(np.float64) - values
    mean = values.mean(axis=0, dtype=np.float64) if codebook.mean is not None else 0.0
    return float(np.sqrt((error**2).mean() / max(((values - mean) ** 2).mean(), np.finfo(float).tiny)))
