"""Batches of a store for training: read, neighbours built and labels normalised ahead of the step."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molkd.cache_schema.epoch import EpochPlan, decoded, iterate_epoch, read_epoch
from molkd.cache_schema.layout import SCALE
from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.references import LabelScale, reference_table
from molkd.pipeline.device import available_cores
from molkd.pipeline.distill.coded import Coded, CodedParts, coded_signals
from molkd.pipeline.distill.losses import Targets, Weights
from molkd.pipeline.distill.teacher_graph import require_rule, sorted_edges, teacher_config
from molkd.pipeline.graphs.batch import BATCH_FIELDS, Batch, Edges, batch_from_arrays
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.prefetch import prefetch_map

_FIELDS = (*BATCH_FIELDS, "energy", "forces")
_CODED = (Coded, CodedParts)
_PREFETCH = 4  # batches ready ahead of the step
_BUILDERS = 4  # threads that build batches for a GPU, which is faster than one thread finds neighbours

Arrays = dict[str, NDArray[Any]]  # one batch as it is read


class Sample(NamedTuple):
    """One training batch with its targets."""

    batch: Batch
    targets: Targets


class CacheLoader:
    """An endless stream of training batches, epoch after epoch, that can be stopped and continued exactly.

    Parameters
    ----------
    cache : the opened store
    subset : (S,) bool, the systems to train on
    rule : the student's neighbour rule
    scale : how labels and the teacher's energies and forces are normalised
    signals : the teacher's signals to deliver; with "edge" the batches are built on the teacher's edges
    rotated : signals that are learnt in the basis of their encoding
    edge_rule : of a student that picks the edges of its features from its own graph: the batches stay as
        `rule` says, and the teacher's edges have to be those of `edge_rule`
    """

    def __init__(
        self,
        cache: Cache,
        subset: NDArray[np.bool_],
        rule: NeighborRule,
        scale: LabelScale,
        *,
        batch_size: int,
        seed: int,
        teacher: str | None = None,
        signals: tuple[str, ...] = (),
        edge_rule: NeighborRule | None = None,
        rotated: Collection[str] = (),
        pin: bool = False,
    ) -> None:
        self.cache = cache
        self.subset = subset
        self.rule = rule
        self.scale = scale
        self.batch_size = batch_size
        self.seed = seed
        self.teacher = teacher
        self.signals = signals
        self.edge_rule = edge_rule
        self.pin = pin
        self._rotated = rotated
        self._codebooks = coded_signals(cache, teacher, signals)
        self.epoch = 0
        self.batch_in_epoch = 0  # the next batch to deliver
        self._references = reference_table(scale.references)  # (119,) eV
        self._teacher_config = teacher_config(cache, teacher)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the subset; the last may be smaller."""
        return -(-int(self.subset.sum()) // self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands: the next batch delivered is the first not yet seen."""
        return {"epoch": self.epoch, "batch_in_epoch": self.batch_in_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict`."""
        self.epoch, self.batch_in_epoch = state["epoch"], state["batch_in_epoch"]

    def __iter__(self) -> Iterator[Sample]:
        """Deliver batches for ever; close the iterator to stop the thread."""
        while True:
            yield from self._rest_of_epoch()
            self.epoch += 1
            self.batch_in_epoch = 0

    def _rest_of_epoch(self) -> Iterator[Sample]:
        read = self.read(self.plan(self.epoch), self.batch_in_epoch)
        samples = prefetch_map(self._build, read, *ahead(self.pin))
        try:
            for sample in samples:
                self.batch_in_epoch += 1
                yield sample
        finally:
            samples.close()

    def _build(self, arrays: Arrays) -> Sample:
        sample = self.make_sample(arrays)
        return pinned(sample) if self.pin else sample

    def plan(self, epoch: int) -> EpochPlan:
        """Return which systems make the batches of an epoch."""
        return iterate_epoch(
            self.cache, subset=self.subset, batch_size=self.batch_size, seed=self.seed, epoch=epoch
        )

    def read(self, plan: EpochPlan, start_batch: int = 0) -> Iterator[Arrays]:
        """Read the batches of a plan from number `start_batch` on, in this thread, for `make_sample`."""
        batches = read_epoch(
            self.cache,
            plan,
            fields=_FIELDS,
            teacher=self.teacher,
            signals=self.signals,
            start_batch=start_batch,
            decode=False,
        )
        for _, arrays in batches:
            yield arrays

    def make_sample(self, arrays: Arrays) -> Sample:
        """Build neighbours and normalised targets from the concatenated arrays of one batch, as stored."""
        rule: NeighborRule | Edges = self.rule
        if "edge" in self.signals:
            arrays = decoded(self.cache, self.teacher, ("edge",), arrays)
            arrays = sorted_edges(arrays)
            if self.edge_rule is None:
                rule = arrays["teacher/edge/index"], arrays["teacher/edge/shift"]
            else:
                require_rule(arrays, self.edge_rule, self._teacher_config)
        return Sample(batch_from_arrays(arrays, rule), self._targets(arrays))

    def _targets(self, arrays: Arrays) -> Targets:
        n_atoms = arrays["n_atoms"]
        references = self._references[arrays["atomic_numbers"]]  # (N,) eV
        offset = np.add.reduceat(references, np.cumsum(n_atoms) - n_atoms) + self.scale.energy_mean  # (S,)
        # Atomic energies carry the mean in equal parts, as Potential.predict gives them back.
        atom_offset = references + np.repeat(self.scale.energy_mean / n_atoms, n_atoms)  # (N,)
        teacher: dict[str, Any] = {}
        for name in self.signals:
            values = arrays[f"teacher/{name}"]
            if f"teacher/{name}/{SCALE}" in arrays:
                teacher[name] = self._coded(name, values, arrays[f"teacher/{name}/{SCALE}"])
                continue
            if name == "energy":
                values = (values - offset) / self.scale.energy_std
            elif name == "atomic_energies":
                values = (values - atom_offset) / self.scale.energy_std
            elif name == "forces":
                values = values / self.scale.forces_std
            teacher[name] = _float32(values)
        return Targets(
            energy=_float32((arrays["energy"] - offset) / self.scale.energy_std),
            forces=_float32(arrays["forces"] / self.scale.forces_std),
            free=torch.from_numpy(~arrays["fixed"].astype(bool)),
            teacher=teacher,
        )

    def _coded(self, name: str, codes: NDArray[Any], scale: NDArray[Any]) -> Tensor | Coded:
        """Return rows of a fitted encoding, decoded unless they go to another device."""
        rows = Coded(
            torch.from_numpy(codes),
            torch.from_numpy(scale),
            self._codebooks[name],
            rotate=name not in self._rotated,
        )
        return rows if self.pin else rows.decode()


def ahead(pin: bool) -> tuple[int, int]:
    """Return how many batches are kept ready and how many threads build them; `pin` means for a GPU."""
    n_threads = max(1, min(_BUILDERS, available_cores() - 1)) if pin else 1
    return _PREFETCH + n_threads - 1, n_threads


def sample_to(sample: Sample, device: torch.device) -> Sample:
    """Move a sample to the device, asynchronously from pinned memory, and decode there what is coded."""
    moved = _map(sample, lambda tensor: tensor.to(device, non_blocking=True))
    teacher = {k: v.decode() if isinstance(v, _CODED) else v for k, v in moved.targets.teacher.items()}
    return moved._replace(targets=moved.targets._replace(teacher=teacher))


def _map(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    targets = sample.targets
    return Sample(
        Batch(*(change(tensor) for tensor in sample.batch)),
        Targets(
            change(targets.energy),
            change(targets.forces),
            change(targets.free),
            {
                name: values.map(change) if isinstance(values, _CODED) else change(values)
                for name, values in targets.teacher.items()
            },
            Weights(*(change(w) for w in targets.weights)) if targets.weights else None,
        ),
    )


def pinned(sample: Sample) -> Sample:
    """Return the sample in memory that a device copies from while it computes."""
    return _map(sample, lambda tensor: tensor.pin_memory())


def _float32(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
