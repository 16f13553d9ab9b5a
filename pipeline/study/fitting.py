"""Before any run: which lines ask for what student or teacher cannot give, and what the store lacks."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import TrainConfig
from molkd.pipeline.distill.coded import in_basis, rotated_bases
from molkd.pipeline.distill.heads import make_heads
from molkd.pipeline.distill.teacher_graph import check_reach, refuse_ties
from molkd.pipeline.errors import CacheError, ConfigError
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.study.grid import Run, signals_read

_ALWAYS = ("energy", "forces")  # of a teacher, whatever its provenance names


class Students:
    """Students with fresh weights, each kind built once."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def of(self, config: TrainConfig) -> Any:
        """Return the student of a run.

        Raises
        ------
        ConfigError
            If a setting of the model is unknown or out of range.
        """
        key = json.dumps(config.model, sort_keys=True)
        if key not in self._built:
            with torch.random.fork_rng(devices=[]):
                self._built[key] = build_model(config.model)
        return self._built[key]

    def n_parameters(self, config: TrainConfig) -> int:
        """Return how many parameters a run's student has."""
        return sum(p.numel() for p in self.of(config).parameters())


def reason_to_skip(cache: Cache, config: TrainConfig, student: Any) -> str | None:
    """Return why student and teacher do not go together, None if they do.

    Raises
    ------
    CacheError
        If the store lacks the teacher, or what the teacher could give.
    """
    signals, teacher = signals_read(config), config.teacher
    if not signals or teacher is None:
        return None
    if teacher not in cache.teachers:
        raise CacheError(
            f"{cache.path}: no teacher {teacher} in this store; name it as the store does "
            f"({', '.join(cache.teachers) or 'it has none'}), or say under `teachers` where it comes from"
        )
    if config.kd_auto:
        return None  # the run takes what it finds
    entry = cache.teachers[teacher]
    offered = tuple(entry.provenance.get("taps", ()))
    for name in signals:
        if offered and name not in (*entry.signals, *offered, *_ALWAYS):
            return f"teacher {teacher} gives no {name}; it gives {', '.join(sorted(offered))}"
    missing = [name for name in signals if name not in entry.signals or not entry.signals[name].complete]
    if missing:
        raise CacheError(
            f"{cache.path}: lacks {', '.join(missing)} of teacher {teacher}; run kd cache-teacher on it with "
            f"--signals {','.join(missing)} (it adds to the store), or say under `teachers` where it is"
        )
    try:
        _check_features(cache, config, teacher, student)
    except ConfigError as error:
        return str(error)
    return None


def _check_features(cache: Cache, config: TrainConfig, teacher: str, student: Any) -> None:
    entry = cache.teachers[teacher]
    rotated = rotated_bases(cache, teacher, config.kd) if config.rotated_targets else {}
    specs = in_basis({name: signal.spec for name, signal in entry.signals.items()}, rotated)
    make_heads(config.kd, student.signals, specs, tuple(entry.provenance.get("taps", ())))
    if any(term.teacher_tap == "edge" for term in config.kd):
        if student.edge_rule == student.neighbor_rule:
            check_reach(cache, np.arange(cache.n_systems), teacher, student.neighbor_rule, config.student)
        else:
            refuse_ties(student.edge_rule, config.student)


def split_fitting(
    runs: Sequence[Run], cache: Cache, students: Students | None = None
) -> tuple[list[Run], dict[str, str]]:
    """Return the runs that can be made, and by line why the others cannot.

    Raises
    ------
    CacheError
        If the store lacks what a teacher could give.
    ConfigError
        If a setting of a model makes no sense, or a strategy fits no pair at all.
    """
    students = students or Students()
    able: list[Run] = []
    skipped: dict[str, str] = {}
    known: dict[str, str | None] = {}  # seeds differ in nothing that matters here
    for run in runs:
        key = json.dumps(run.config.model_dump(mode="json", exclude={"out", "seed", "label"}), sort_keys=True)
        if key not in known:
            known[key] = reason_to_skip(cache, run.config, students.of(run.config))
        if (reason := known[key]) is None:
            able.append(run)
        else:
            skipped |= dict.fromkeys((cell.name for cell in run.cells), reason)
    _refuse_useless(runs, able, skipped)
    return able, skipped


def _refuse_useless(runs: Sequence[Run], able: Sequence[Run], skipped: Mapping[str, str]) -> None:
    """Refuse a strategy that no pair can follow: it is a slip of the pen."""
    asked, possible = ({c.strategy for run in these for c in run.cells} for these in (runs, able))
    for strategy in sorted(asked - possible):
        reason = next(r for name, r in skipped.items() if name.split("/")[1].split("__")[0] == strategy)
        raise ConfigError(f"strategies.{strategy}: fits no pair: {reason}")
