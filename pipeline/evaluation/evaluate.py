"""Apply a model to labelled systems: metrics, throughput and a bounded sample of points for parity plots.

Works with anything that turns a `Batch` into energies and forces, so with a student and with a teacher::

    evaluate(potential.predict, systems, potential.neighbor_rule)
    evaluate(lambda batch: teacher.compute(batch, ("energy", "forces")), systems, teacher.neighbor_rule)
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molkd.pipeline.data.sources import Source
from molkd.pipeline.data.system import System
from molkd.pipeline.data.validate import check_system
from molkd.pipeline.errors import DataError, ModelError
from molkd.pipeline.evaluation.breakdown import KINDS
from molkd.pipeline.evaluation.collect import Collector, split_atoms
from molkd.pipeline.evaluation.fingerprint import Fingerprint
from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.evaluation.throughput import ThroughputMeter
from molkd.pipeline.evaluation.worst import WorstSystems
from molkd.pipeline.graphs.batch import Batch, batch_from_systems, to_device
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.scope import Scope

Predict = Callable[[Batch], Mapping[str, Tensor]]
OnPrediction = Callable[
    [System, float, NDArray[np.float64]], None
]  # system, energy in eV, forces (N, 3) in eV/A


def evaluate(
    predict: Predict,
    systems: Iterable[System],
    rule: NeighborRule,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    measure_throughput: bool = True,
    breakdowns: Sequence[str] = KINDS,
    worst: WorstSystems | None = None,
    weights_sha256: str = "",
    on_batch: Callable[[int], None] | None = None,
    on_prediction: OnPrediction | None = None,
) -> Evaluation:
    """Compare predictions with labels, in one pass that holds one batch at a time.

    Parameters
    ----------
    predict : from a batch on `device` to at least energy (S,) in eV and forces (N, 3) in eV/A; called with
        gradients off, a model that needs them turns them on for itself
    systems : read once, in order; a missing label is NaN
    rule : neighbour rule that batches are built with
    batch_size : systems a batch; results do not depend on it, throughput does
    device, dtype : where batches are moved and their floating type
    seed : of the random choice of points for parity plots
    measure_throughput : False saves the warm-up calls and repeats, for validation during training
    breakdowns : what errors are told apart by, see `breakdown.check_kind`
    worst : filled with the systems that the model is most wrong about; None takes one of the usual size
    weights_sha256 : of the model, kept in the result so that it can be told from another's
    on_batch : called after each batch with the number of systems done so far
    on_prediction : called for each system with its predicted energy and forces

    Raises
    ------
    DataError
        If there is no system.
    ModelError
        If energy or forces are absent from the output, or not finite for a system, which is named.

    Notes
    -----
    Throughput counts the model only: no neighbour lists, no transfer; see `ThroughputMeter`.
    """
    device = torch.device(device)
    meter = ThroughputMeter(predict, device) if measure_throughput else None
    collector = Collector(seed, breakdowns, worst)
    seen = Fingerprint()
    n_done = 0
    for chunk in _chunks(systems, batch_size):
        batch = to_device(batch_from_systems(chunk, rule, dtype), device)
        with torch.no_grad():
            output = meter.predict(batch) if meter else predict(batch)
        energy_pred, forces_pred = _checked(output, chunk)
        collector.add(chunk, energy_pred, forces_pred)
        for system in chunk:
            seen.add(system)
        n_done += len(chunk)
        if on_prediction is not None:
            for system, energy, its_forces in zip(
                chunk, energy_pred, split_atoms(forces_pred, chunk), strict=True
            ):
                on_prediction(system, float(energy), its_forces)
        if on_batch is not None:
            on_batch(n_done)
    if n_done == 0:
        raise DataError("nothing to evaluate: the data hold no system; check the path and the split")
    with torch.no_grad():
        throughput = meter.result() if meter else None
    return collector.result(throughput, weights_sha256, seen.hexdigest())


def known_systems(source: Source, scope: Scope) -> Iterator[System]:
    """Yield the systems of a source, refusing what makes no sense and what a model was not made for.

    Raises
    ------
    DataError
        If a system cannot be read or makes no sense.
    ModelError
        If it is out of scope.
    """
    for index in range(len(source)):
        system = source.read(index)
        check_system(system)
        scope.check(system)
        yield system


def _chunks(systems: Iterable[System], size: int) -> Iterable[list[System]]:
    iterator = iter(systems)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _checked(
    output: Mapping[str, Tensor], chunk: Sequence[System]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return energy (S,) and forces (N, 3) on the host, or say what is wrong with which system."""
    missing = [name for name in ("energy", "forces") if name not in output]
    if missing:
        raise ModelError(
            f"the model gives {', '.join(sorted(output))}; evaluation also needs {' and '.join(missing)}"
        )
    energy = output["energy"].detach().cpu().numpy().astype(np.float64)
    forces = output["forces"].detach().cpu().numpy().astype(np.float64)
    for system, e, f in zip(chunk, energy, split_atoms(forces, chunk), strict=True):
        if not (np.isfinite(e) and np.isfinite(f).all()):
            what = "forces" if np.isfinite(e) else "energy"
            raise ModelError(
                f"{system.source}: the predicted {what} is not finite; look at this structure, "
                "or train with a smaller learning rate if every structure fails"
            )
    return energy, forces
