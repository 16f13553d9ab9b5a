"""Everything a run decides before its first step: systems, scale, student, weights of the losses."""

import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import TrainConfig
from molkd.pipeline.data.references import LabelScale, fit_label_scale
from molkd.pipeline.distill.coded import in_basis, ratios, rotated_bases
from molkd.pipeline.distill.heads import make_heads
from molkd.pipeline.distill.lambdas import term_weight
from molkd.pipeline.distill.mixed_stores import TrainingStore, add_references, describe_mix, open_mixed
from molkd.pipeline.distill.objective import Objective, needed_signals
from molkd.pipeline.distill.statistics import LabelStatistics, label_statistics
from molkd.pipeline.distill.systems import choose_systems, choose_teacher
from molkd.pipeline.distill.teacher_graph import check_reach, refuse_ties
from molkd.pipeline.errors import ConfigError, DataError
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.scope import Scope

log = logging.getLogger(__name__)

_REFERENCE_SAMPLE = 2000  # systems
_MAX_REFERENCE_OFFSET = 10.0  # label scales; an honest teacher is off by a fraction of one


@dataclass(frozen=True)
class Setup:
    """The fixed parts of a run."""

    train: NDArray[np.bool_]  # (S,) systems of the store to train on
    val: NDArray[np.bool_]  # (S,) systems held out by id; none if the validation data are elsewhere
    teacher: str | None
    signals: tuple[str, ...]
    potential: Potential
    objective: Objective
    edge_rule: NeighborRule | None  # of a student that picks the edges of its features from its own graph
    rotated: frozenset[str]  # signals learnt in the basis of their encoding
    mixed: tuple[TrainingStore, ...] = ()  # further stores, in the order of `config.mix`


def prepare(
    cache: Cache, config: TrainConfig, device: torch.device, held_out: frozenset[bytes] = frozenset()
) -> Setup:
    """Decide everything from store and settings; each decision is logged with its reason.

    Parameters
    ----------
    held_out : ids of systems that must not be trained on
    """
    teacher = choose_teacher(cache, config)
    signals = needed_signals(config.kd, pseudo_labels=config.pseudo_labels)
    train, val = choose_systems(cache, config, teacher, signals, held_out)
    main = TrainingStore(cache, train, teacher)
    mixed = open_mixed(config, main, val, signals, held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = build_model(config.model)
        if "forces" not in model.signals:
            raise ConfigError("a student needs forces: leave model.regress_forces true")
        rotated = rotated_bases(cache, teacher, config.kd) if config.rotated_targets else {}
        specs = in_basis(_teacher_specs(cache, teacher), rotated)
        heads = make_heads(config.kd, model.signals, specs, _offered(cache, teacher))
    edge_rule: NeighborRule | None = None if model.edge_rule == model.neighbor_rule else model.edge_rule
    if "edge" in signals:
        _check_edges((main, *mixed), model.neighbor_rule, edge_rule, config.student)
    statistics, scale, elements = _measure_labels((main, *mixed), signals, config, model.forces_from)
    systems = np.flatnonzero(train)
    weights = {
        t.label: term_weight(t, cache, teacher, statistics, scale, config, systems, model.neighbor_rule)
        for t in config.kd
    }
    training = config.training
    objective = Objective(
        config.kd,
        weights,
        heads,
        training.energy_weight,
        training.forces_weight,
        training.gradient_weight,
        ratios(rotated),
    )
    scope = Scope(config.student, frozenset(range(1, int(model.max_atomic_number) + 1)), model.neighbor_rule)
    for store in (main, *mixed):
        scope.check_store(store.cache, np.flatnonzero(store.train))
    provenance = _provenance(cache, config, teacher, train) | {"elements": elements}
    if mixed:
        provenance["mix"] = describe_mix(config, mixed)
    potential = Potential(model.to(device), scale, {"model": config.model, "provenance": provenance})
    return Setup(
        train, val, teacher, signals, potential, objective.to(device), edge_rule, frozenset(rotated), mixed
    )


def record_weights(setup: Setup) -> None:
    """Write the weights of the losses, some of which the first batches decide, into the provenance."""
    for entry in setup.potential.metadata["provenance"]["kd"]:
        entry["weight"] = setup.objective.weights[entry["label"]]


def _asked(weight: float | str) -> str:
    return weight if isinstance(weight, str) else "given"


def _check_edges(
    stores: tuple[TrainingStore, ...], rule: NeighborRule, edge_rule: NeighborRule | None, student: str
) -> None:
    for store in stores:
        if store.teacher is None:
            continue
        if edge_rule is None:
            check_reach(store.cache, np.flatnonzero(store.train), store.teacher, rule, student)
        else:
            refuse_ties(edge_rule, student)


def _measure_labels(
    stores: tuple[TrainingStore, ...], signals: tuple[str, ...], config: TrainConfig, forces_from: str
) -> tuple[LabelStatistics, LabelScale, list[int]]:
    """Return what the main store's labels look like, their scale, and the elements with known energies."""
    uses_energies = bool({"energy", "atomic_energies"} & set(signals))
    read = tuple(sorted({"energy", "atomic_energies", "forces"} & set(signals)))
    statistics, *further = (label_statistics(s.cache, s.train, s.teacher, read) for s in stores)
    _check_labels(stores[0], config, statistics, forces_from)
    if not any(one.n_labelled_forces for one in (statistics, *further)):
        _check_without_forces(stores[0], config, forces_from)
    scale = add_references(_fit_scale(config, statistics), further, config)
    elements = _elements_with_reference(stores, (statistics, *further), scale)
    for store in stores:
        if store.teacher is not None and uses_energies:
            _check_energy_reference(store.cache, store.train, store.teacher, scale)
    return statistics, scale, elements


def _elements_with_reference(
    stores: tuple[TrainingStore, ...], statistics: tuple[LabelStatistics, ...], scale: LabelScale
) -> list[int]:
    """Return the elements whose energies the student learns; others occur without any energy."""
    found = sorted({z for one in statistics for z in one.elements})
    if not scale.references:
        return found
    without = [z for z in found if z not in scale.references]
    if without:
        log.warning(
            "%s: no system with an energy holds the elements with atomic numbers %s; the student learns "
            "features and forces of them, but will refuse to predict their energies",
            ", ".join(str(store.cache.path) for store in stores),
            ", ".join(str(z) for z in without),
        )
    return [z for z in found if z in scale.references]


def _teacher_specs(cache: Cache, teacher: str | None) -> dict[str, FieldSpec]:
    return {n: s.spec for n, s in cache.teachers[teacher].signals.items()} if teacher else {}


def _offered(cache: Cache, teacher: str | None) -> tuple[str, ...]:
    """Return what the teacher can give beside energy and forces, as its provenance tells."""
    return tuple(cache.teachers[teacher].provenance.get("taps", ())) if teacher else ()


def _check_labels(
    store: TrainingStore, config: TrainConfig, statistics: LabelStatistics, forces_from: str
) -> None:
    """Refuse a run that nothing teaches energies or forces: features alone make no potential."""
    instead = {"vanilla1", "vanilla2"} | ({"grad"} if forces_from == "gradient" else set())
    supervised = config.pseudo_labels or any(t.name in instead for t in config.kd)
    has_energies = np.isfinite(store.cache.energy[store.train]).any()
    if not (has_energies or statistics.n_labelled_forces or supervised):
        raise DataError(
            f"{store.cache.path}: no system has an energy or forces to train on; "
            "ingest with --energy-key, or learn from the teacher with --pseudo-labels or --kd vanilla1"
        )


def _check_without_forces(store: TrainingStore, config: TrainConfig, forces_from: str) -> None:
    """Say what comes of a run whose labels hold no forces, if the teacher's do not stand in.

    Raises
    ------
    ConfigError
        If `gradient_weight` asks for the slope against labelled forces.
    """
    if config.pseudo_labels:
        return
    if config.training.gradient_weight > 0:
        raise ConfigError(
            f"{store.cache.path}: training.gradient_weight needs labelled forces, there are none; "
            "leave it out, or learn from the teacher with --kd grad or --pseudo-labels"
        )
    if forces_from == "direct" and not any(t.name == "vanilla1" for t in config.kd):
        log.warning(
            "%s: no forces are labelled, so nothing teaches this student its direct forces, they will mean "
            "nothing; add --pseudo-labels or --kd vanilla1",
            store.cache.path,
        )


def _check_energy_reference(cache: Cache, train: NDArray[np.bool_], teacher: str, scale: LabelScale) -> None:
    """Refuse to mix labels with a teacher's energies that have another zero or unit."""
    entry = cache.teachers[teacher].signals.get("energy")
    labelled = np.flatnonzero(train & np.isfinite(cache.energy))[:_REFERENCE_SAMPLE]
    if entry is None or not entry.complete or len(labelled) == 0:
        return
    values = cache.read(labelled, ("energy",), teacher=teacher, signals=("energy",))
    offset = float(np.abs(values["teacher/energy"] - values["energy"]).mean())
    if offset > _MAX_REFERENCE_OFFSET * scale.energy_std:
        raise ConfigError(
            f"{cache.path}: energies of teacher {teacher} differ from the labels by {offset:.4g} eV on "
            f"average, the labels' own scale is {scale.energy_std:.4g} eV: another reference or level "
            "of theory; take n2n or v2v, which use no energies, or a teacher trained on such labels"
        )


def _fit_scale(config: TrainConfig, statistics: LabelStatistics) -> LabelScale:
    references = config.training.references
    scale = fit_label_scale(
        statistics.counts,
        statistics.energies,
        statistics.forces_rms,
        mode=config.training.normalization,
        references=references,
    )
    log.info(
        "labels: %d energies; references %s; energy mean %.4f eV, scale %.4f eV, forces scale %.4f eV/A",
        statistics.n_energies,
        {z: round(e, 3) for z, e in scale.references.items()} or "none",
        scale.energy_mean,
        scale.energy_std,
        scale.forces_std,
    )
    return scale


def _provenance(
    cache: Cache,
    config: TrainConfig,
    teacher: str | None,
    train: NDArray[np.bool_],
) -> dict[str, Any]:
    parent = cache.teachers[teacher].provenance if teacher else None
    return {
        "student": config.student,
        "label": config.label,
        "dataset_fingerprint": cache.fingerprint,
        "store": Path(cache.path).name,
        "data": {k: v for k in ("licence", "citation") if (v := cache.dataset.get(k))},
        "code": f"molkd {version('molkd')}, torch {torch.__version__}",
        "n_training_systems": int(train.sum()),
        "n_training_energies": int(np.isfinite(cache.energy[train]).sum()),
        "teacher": parent,
        # Weights come from `record_weights`, how they were asked for stays.
        "kd": [t.model_dump() | {"label": t.label, "weight_by": _asked(t.weight)} for t in config.kd],
        "pseudo_labels": config.pseudo_labels,
        "gradient_weight": config.training.gradient_weight,
        "seed": config.seed,
        "method": "arXiv:2306.14818",
    }
