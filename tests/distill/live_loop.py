"""A plain distillation loop that asks the teacher itself in every step: what the cache has to be equal to.

Written apart from the package's training code: own sums, own schedule, own batches from the original file.
"""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from distill_cases import COLL, read_systems
from torch import nn

from molkd.cache_schema.epoch import iterate_epoch
from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm, TrainConfig
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.data.splits import split_mask
from molkd.pipeline.graphs.batch import Batch, batch_from_systems
from molkd.pipeline.models.gemnet_oc.model import GemNetOC
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.models.scaling import fit_scale_factors
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher


def live_loss_curves(config: TrainConfig, teacher_file: Path, scale: LabelScale) -> dict[str, list[float]]:
    """Return the loss and its unweighted terms, by label, of every step.

    Parameters
    ----------
    scale : of the labels, as the run from the cache used it
    """
    teacher = load_teacher(str(teacher_file), device="cpu")
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    heads = {t.label: _head(t, model, teacher) for t in config.kd if not t.name.startswith("vanilla")}
    weights = {term.label: term.weight for term in config.kd}
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameters += [p for head in heads.values() for p in head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0, amsgrad=True, eps=1e-8)
    fit_scale_factors(model, (_graph(b, config.kd, model, teacher) for b in _first_epoch(config)))
    curves: dict[str, list[float]] = {}
    for step, batch in zip(range(config.training.max_steps or 0), _batches(config), strict=False):
        optimizer.param_groups[0]["lr"] = _lr(config, step)
        parts = _losses(config.kd, model, heads, batch, teacher, scale)
        parts["loss"] = parts["base"] + sum(weight * parts[name] for name, weight in weights.items())
        optimizer.zero_grad()
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        for name, value in parts.items():
            curves.setdefault(name, []).append(value.item())
    return curves


def _head(term: KDTerm, model, teacher: Teacher) -> nn.Linear:
    n_in = sum(model.signals[tap].shape[-1] for tap in term.student_taps)
    n_out = teacher.signals[term.teacher_tap].shape[-1]
    return nn.Linear(n_in, n_out, bias=term.name != "v2v")


def _first_epoch(config):
    n_train = (~split_mask(Cache.open(config.store).ids, config.val_fraction)).sum()
    return islice(_batches(config), -(-n_train // config.training.batch_size))


def _batches(config):
    """The systems of each step from the original file, in the order of the store's epochs."""
    systems = read_systems(COLL)
    cache = Cache.open(config.store)
    train = ~split_mask(cache.ids, config.val_fraction)
    epoch = 0
    while True:
        size = config.training.batch_size
        for rows in iterate_epoch(cache, subset=train, batch_size=size, seed=config.seed, epoch=epoch):
            yield [systems[cache.source_row[row]] for row in rows]
        epoch += 1


def _lr(config: TrainConfig, step: int) -> float:
    """Warm-up of 5 steps from a fifth, decay to a hundredth at the end of the run."""
    steps = config.training.max_steps or 1
    return config.training.lr * min(1.0, 0.2 + 0.8 * step / 5) * 0.01 ** (step / steps)


def _graph(systems, terms, model, teacher: Teacher) -> Batch:
    """The student's own edges; with e2e the teacher's, but for a GemNet-OC, which picks them from its own."""
    batch = batch_from_systems(systems, model.neighbor_rule)
    if isinstance(model, GemNetOC) or not any(term.name == "e2e" for term in terms):
        return batch
    edges = teacher.compute(batch_from_systems(systems, teacher.neighbor_rule), ("edge",))
    shift = edges["edge_shift"].to(batch.positions.dtype)
    return batch._replace(edge_index=edges["edge_index"], edge_shift=shift)


def _losses(terms, model, heads, systems, teacher: Teacher, scale: LabelScale) -> dict[str, torch.Tensor]:
    n_atoms = torch.tensor([s.n_atoms for s in systems])
    signals = teacher.compute(
        batch_from_systems(systems, teacher.neighbor_rule), {s for term in terms for s in term.signals}
    )
    batch = _graph(systems, terms, model, teacher)
    student = model(batch, {tap for term in terms for tap in term.student_taps})

    per_atom = np.array([scale.references[int(z)] for s in systems for z in s.atomic_numbers])
    reference = torch.tensor([part.sum() for part in np.split(per_atom, np.cumsum(n_atoms.numpy())[:-1])])
    energy = torch.tensor([s.energy for s in systems], dtype=torch.float64)
    forces = torch.from_numpy(np.concatenate([s.forces for s in systems])) / scale.forces_std
    share = torch.from_numpy(per_atom) + (scale.energy_mean / n_atoms.double()).repeat_interleave(n_atoms)

    def normal(values: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return ((values - offset) / scale.energy_std).float()

    def base(energies: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        error = (student["energy"] - normal(energies, reference + scale.energy_mean)).abs().mean()
        return error + 100 * (student["forces"] - vectors.float()).norm(dim=1).mean()

    losses = {"base": base(energy, forces)}
    for term in terms:
        if term.name == "vanilla1":
            value = base(signals["energy"], signals["forces"] / scale.forces_std)
        elif term.name == "vanilla2":
            value = (student["atomic_energies"] - normal(signals["atomic_energies"], share)).abs().mean()
        else:
            features = torch.cat([student[tap] for tap in term.student_taps], dim=-1)
            value = (heads[term.label](features) - signals[term.teacher_tap]).square().mean()
        losses[term.label] = value
    return losses
