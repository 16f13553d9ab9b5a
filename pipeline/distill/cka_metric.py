"""CKA between student and cached teacher while a student trains: a metric that is logged, never a loss.

For each loss on features of atoms (n2n, e2n, v2v) it compares what the loss compares, but without the head:
the tapped features of the weights that are validated, and the teacher's signal, on a few systems that are the
same all through the run. Nothing of the run depends on it.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm, TrainConfig
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.distill.student import Setup
from molkd.pipeline.evaluation.cka import CKASums, atom_batches
from molkd.pipeline.graphs.batch import Batch, batch_from_systems, to_device

log = logging.getLogger(__name__)

_SYSTEMS_PER_BATCH = 32
_SEED = 0  # of how the atoms are mixed: the same at every validation of every run


@dataclass(frozen=True, eq=False)
class CKAMetric:
    """The systems, and what the teacher says of their atoms."""

    terms: tuple[KDTerm, ...]
    batches: tuple[tuple[Batch, dict[str, Tensor]], ...]  # with signals (N, ...) by name, on the host
    device: torch.device

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return `cka_<label>` for each term; NaN where features are equal at all atoms.

        Random numbers and gradients are left alone, and so is the mode of the model.
        """
        if not self.batches:
            return {}
        was_training = model.training
        model.eval()
        taps = tuple(sorted({tap for term in self.terms for tap in term.student_taps}))
        blocks = []
        with torch.no_grad():
            for batch, signals in self.batches:
                out = model(to_device(batch, self.device), taps, forces=False)
                student = [torch.cat([out[t].float() for t in m.student_taps], -1).cpu() for m in self.terms]
                blocks.append(student + [signals[term.teacher_tap] for term in self.terms])
        model.train(was_training)
        sums = [CKASums() for _ in self.terms]
        for features in atom_batches(blocks, np.random.default_rng(_SEED)):
            students, teachers = features[: len(sums)], features[len(sums) :]
            for one, student_features, signal in zip(sums, students, teachers, strict=True):
                one.add([student_features], [signal])
        values = [float(one.values()[0, 0]) if one.n_batches else float("nan") for one in sums]
        return dict(zip(cka_columns(self.terms), values, strict=True))


def cka_terms(terms: tuple[KDTerm, ...]) -> tuple[KDTerm, ...]:
    """Return the losses on features of atoms."""
    return tuple(term for term in terms if term.student_taps and term.teacher_tap != "edge")


def cka_columns(terms: tuple[KDTerm, ...]) -> list[str]:
    """Return the columns of metrics.csv, those that stay empty without systems included."""
    return [f"cka_{term.label}" for term in cka_terms(terms)]


def prepare_cka(cache: Cache, setup: Setup, config: TrainConfig, device: torch.device) -> CKAMetric:
    """Read the systems: the first held-out ones in the store's random order; if it has none, training ones.

    Without a loss on features, or with `cka_systems` 0, nothing is read and nothing will be measured.
    """
    terms = cka_terms(config.kd)
    if not terms or setup.teacher is None or not config.cka_systems:
        return CKAMetric(terms, (), device)
    chosen, is_held_out = _choose(cache, setup, config.cka_systems)
    log.info(
        "cka_* in metrics.csv: %d %s systems, student's features against the teacher's",
        len(chosen),
        "held-out" if is_held_out else "training",
    )
    source = StoreSource(cache)
    signals = tuple(sorted({term.teacher_tap for term in terms}))
    batches = []
    for begin in range(0, len(chosen), _SYSTEMS_PER_BATCH):
        rows = chosen[begin : begin + _SYSTEMS_PER_BATCH]
        values = cache.read(rows, (), teacher=setup.teacher, signals=signals)
        batch = batch_from_systems([source.read(int(i)) for i in rows], setup.potential.neighbor_rule)
        batches.append((batch, {s: torch.from_numpy(values[f"teacher/{s}"]).float() for s in signals}))
    return CKAMetric(terms, tuple(batches), device)


def _choose(cache: Cache, setup: Setup, n: int) -> tuple[NDArray[np.int64], bool]:
    assert setup.teacher is not None
    usable = np.ones(cache.n_systems, dtype=bool)
    usable[cache.bad_systems(setup.teacher)] = False
    held_out = np.flatnonzero(setup.val & usable)
    return (held_out if len(held_out) else np.flatnonzero(setup.train & usable))[:n], len(held_out) > 0
