"""From a method to a store: make, sift, compare, write; then ingest, and the teacher's signals.

Starts are numbered; what one leads to depends on the seed and its number alone. They are done in chunks of a
fixed number, so that batches are the same whether a run was cut off or not.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.reader import Cache
from molkd.pipeline.augment.frame import Frame
from molkd.pipeline.augment.look import Looking, largest_force
from molkd.pipeline.augment.record import Progress as Done
from molkd.pipeline.augment.record import Record, require_same
from molkd.pipeline.augment.sifting import Met, within_forces, without_contacts
from molkd.pipeline.caching import CacheSummary, cache_teacher
from molkd.pipeline.config import IngestConfig
from molkd.pipeline.config.augment import AugmentConfig
from molkd.pipeline.data.lineage import parents_facts
from molkd.pipeline.errors import ConfigError, DataError
from molkd.pipeline.ingest import ingest
from molkd.pipeline.progress import Progress

log = logging.getLogger(__name__)

AUGMENTATION = "augmentation"  # key among the facts that a store keeps on its data
CHUNK = 32  # starts


class Method(Protocol):
    """What makes structures."""

    @property
    def n_starts(self) -> int:
        """How many starts there are."""
        ...

    def make(self, starts: Sequence[int], dropped: Counter[str]) -> list[Frame]:
        """Return what these starts lead to, and count what did not come off, by its reason."""
        ...


@dataclass(frozen=True)
class Origin:
    """What a store keeps of where its structures come from, beside the method's settings."""

    method: str
    inputs: dict[str, str] = field(
        default_factory=dict
    )  # hashes of what is read: the structures depend on it
    facts: dict[str, Any] = field(default_factory=dict)  # in words: paths, counts
    roots: dict[str, str] | None = field(default_factory=dict)  # see `parents_facts`
    licence: str = ""
    citation: str = ""


@dataclass(frozen=True)
class AugmentSummary:
    """What `kd augment` did; `dropped` says why, over starts and structures alike."""

    store: str
    method: str
    n_starts: int
    n_made: int
    n_kept: int
    dropped: dict[str, int]
    means: dict[str, float]
    n_atoms: int
    teacher: str
    signals: dict[str, str]
    structures: str  # file with the origin of each; empty if it was removed
    seconds: float


def augment(method: Method, origin: Origin, config: AugmentConfig, looking: Looking) -> AugmentSummary:
    """Make the structures, put them into the store, and cache the teacher's signals; or go on with it.

    Raises
    ------
    ConfigError
        If the store, or the folder of structures beside it, was made otherwise.
    DataError
        If no structure is left.
    """
    began = time.perf_counter()
    record = Record(config.cache.store)
    facts = _facts_of_store(config.cache.store) if not record.folder.exists() else None
    recipe = recipe_of(method, origin, config, looking)
    if facts is not None:
        require_same(config.cache.store, facts["recipe"], recipe)
        log.info("%s: its structures are made", config.cache.store)
    else:
        facts = _fill_store(method, origin, config, looking, record, recipe)
    cached = cache_teacher(config.cache)
    return _summary(facts, record, cached, time.perf_counter() - began)


def recipe_of(method: Method, origin: Origin, config: AugmentConfig, looking: Looking) -> dict[str, Any]:
    """Return all that the structures depend on: settings, and the contents of files by their hashes."""
    left_out = {"cache", "data", "student", "n"}
    teacher = looking.teacher
    return {
        "method": origin.method,
        **config.model_dump(mode="json", exclude=left_out),
        "n_starts": method.n_starts,
        "teacher": teacher.info.weights_sha256,
        "precision": str(teacher.dtype).removeprefix("torch."),
        **origin.inputs,
    }


def _facts_of_store(store: Path) -> dict[str, Any] | None:
    """Return how the structures of a store were made, None if there is no store.

    Raises
    ------
    ConfigError
        If they were not made by `augment`.
    """
    if not (store / PLAN).exists():
        return None
    with Cache.open(store) as cache:
        facts = cache.dataset.get(AUGMENTATION)
    if not isinstance(facts, dict) or not isinstance(facts.get("recipe"), dict):
        raise ConfigError(f"{store}: is a store that kd augment has not made; choose another name")
    return facts


def _fill_store(
    method: Method,
    origin: Origin,
    config: AugmentConfig,
    looking: Looking,
    record: Record,
    recipe: dict[str, Any],
) -> dict[str, Any]:
    """Make the structures that are missing, and ingest all of them."""
    with record.locked():
        done = make_structures(method, config, looking, record, record.resume(recipe))
        facts = {"recipe": recipe, **origin.facts, **_outcome(done)}
        ingest(
            IngestConfig(
                data=(record.structures,), store=config.cache.store, seed=config.seed,
                licence=origin.licence, citation=origin.citation, augmentation=facts,
                parents=parents_facts(str(record.structures), record.parents(), origin.roots),
            )
        )  # fmt: skip
    return facts


def make_structures(
    method: Method, config: AugmentConfig, looking: Looking, record: Record, done: Done
) -> Done:
    """Make what is missing of the structures, chunk by chunk.

    Raises
    ------
    DataError
        If none is left in the end.
    """
    met = Met(config.min_displacement, config.min_energy_difference)
    if 0 < done.n_done < method.n_starts:
        log.info("continuing: %d of %d starts are done", done.n_done, method.n_starts)
        for frame in record.frames():
            met.add(frame)
    with Progress(method.n_starts, "make", "start", initial=done.n_done) as progress:
        while done.n_done < method.n_starts:
            chunk = range(done.n_done, min(done.n_done + CHUNK, method.n_starts))
            dropped: Counter[str] = Counter()
            frames = method.make(chunk, dropped)
            done.n_made += len(frames)
            frames = without_contacts(frames, config.min_contact, dropped)
            frames = within_forces(labelled(frames, looking), config.max_force, dropped)
            frames = met.new_ones(frames, dropped)
            done.n_done = chunk.stop
            done.count(frames, dropped)
            record.add(frames, done)
            progress.update(len(chunk))
    if done.n_frames == 0:
        raise DataError(
            f"{record.folder}: nothing is left of {done.n_made} structures from {done.n_done} starts "
            f"({_in_words(done.dropped)}); allow more (--min-contact, --max-force), or displace less"
        )
    return done


def labelled(frames: Sequence[Frame], looking: Looking) -> list[Frame]:
    """Have the teacher look at those that it has not seen."""
    unseen = [k for k, frame in enumerate(frames) if np.isnan(frame.energy)]
    found = list(frames)
    for k, seen in zip(unseen, looking.look([frames[k].system for k in unseen]), strict=True):
        largest = largest_force(seen.forces, frames[k].system.fixed)
        found[k] = replace(frames[k], energy=seen.energy, largest_force=largest)
    return found


def _outcome(done: Done) -> dict[str, Any]:
    means = {f"mean_{key}": total / done.n_frames for key, total in done.sums.items()}
    return {"n_made": done.n_made, "n_kept": done.n_frames, "dropped": done.dropped, **means}


def _in_words(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none dropped"


def _summary(facts: dict[str, Any], record: Record, cached: CacheSummary, seconds: float) -> AugmentSummary:
    return AugmentSummary(
        store=cached.store,
        method=facts["recipe"]["method"],
        n_starts=facts["recipe"]["n_starts"],
        n_made=facts["n_made"],
        n_kept=facts["n_kept"],
        dropped=facts["dropped"],
        means={key: value for key, value in facts.items() if key.startswith("mean_")},
        n_atoms=cached.n_atoms,
        teacher=cached.teacher,
        signals=cached.signals,
        structures=str(record.structures) if record.structures.exists() else "",
        seconds=seconds,
    )
