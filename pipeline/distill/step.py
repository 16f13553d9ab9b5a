"""The state of a run and the one step that changes it (Eq. 2)."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import TrainConfig
from molkd.pipeline.distill.loader import CacheLoader, Sample, sample_to
from molkd.pipeline.distill.losses import LossTerms, fill_labels
from molkd.pipeline.distill.mixed_loader import MixedLoader
from molkd.pipeline.distill.mixed_stores import TrainingStore, systems_a_batch
from molkd.pipeline.distill.objective import Objective
from molkd.pipeline.distill.optim import lr_factor, make_ema, make_optimizer, update_ema
from molkd.pipeline.distill.student import Setup
from molkd.pipeline.graphs.batch import Batch
from molkd.pipeline.models.blocks import energy_gradient
from molkd.pipeline.models.interface import Outputs
from molkd.pipeline.models.potential import Potential


@dataclass
class TrainState:
    """Everything that changes during a run, and that resuming brings back exactly."""

    potential: Potential
    objective: Objective
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None  # holds the moving average of the weights
    loader: CacheLoader | MixedLoader
    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    best_val: dict[str, float | None] | None = None
    n_stale: int = 0  # validations since the best one or the last plateau
    n_plateaus: int = 0
    sums: Tensor | None = None  # of the loss and its parts since the last row of metrics.csv
    n_summed: int = 0

    @property
    def averaged(self) -> nn.Module:
        """The weights that are validated and kept: the average, or the raw ones where none is held."""
        model: nn.Module = self.ema if self.ema is not None else self.potential.model
        return model

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain values and tensors, for `torch.save`."""
        return {
            "model": self.potential.model.state_dict(),
            "objective": self.objective.state_dict(),
            "kd_weights": self.objective.weights,
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "loader": self.loader.state_dict(),
            "counters": {
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best,
                "best_step": self.best_step,
                "best_val": self.best_val,
                "n_stale": self.n_stale,
                "n_plateaus": self.n_plateaus,
                "sums": self.sums,
                "n_summed": self.n_summed,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.potential.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        self.objective.weights.update(state.get("kd_weights", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.loader.load_state_dict(state["loader"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        if self.sums is not None:
            self.sums = self.sums.to(self.potential.device)


def initial_state(cache: Cache, setup: Setup, config: TrainConfig, device: torch.device) -> TrainState:
    """Put optimiser, average and batches beside a prepared student."""
    model = setup.potential.model
    model.train()
    return TrainState(
        potential=setup.potential,
        objective=setup.objective,
        optimizer=make_optimizer([*model.parameters(), *setup.objective.parameters()], config.training),
        ema=make_ema(model) if config.training.ema_decay else None,
        loader=_make_loader(cache, setup, config, device),
    )


def _make_loader(
    cache: Cache, setup: Setup, config: TrainConfig, device: torch.device
) -> CacheLoader | MixedLoader:
    main = TrainingStore(cache, setup.train, setup.teacher)
    stores, counts = (main, *setup.mixed), systems_a_batch(config)
    # The main store's order stays that of a run without further stores.
    seeds = [config.seed, *(_seed_of(config.seed, number) for number in range(1, len(stores)))]
    first, *others = (
        CacheLoader(
            store.cache,
            store.train,
            setup.potential.neighbor_rule,
            setup.potential.scale,
            batch_size=count,
            seed=seed,
            teacher=store.teacher,
            signals=setup.signals,
            edge_rule=setup.edge_rule,
            rotated=setup.rotated,
            pin=device.type == "cuda",
        )
        for store, count, seed in zip(stores, counts, seeds, strict=True)
    )
    return MixedLoader(first, others, [mix.weight for mix in config.mix]) if others else first


def _seed_of(seed: int, number: int) -> int:
    """Return the seed of the order in which a further store is used."""
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)[0])


@contextmanager
def first_samples(loader: CacheLoader | MixedLoader, n: int) -> Iterator[Iterator[Sample]]:
    """Look at the first samples, no more than an epoch of them, without moving the place in the stream."""
    samples = iter(copy.copy(loader))  # with a place of its own
    try:
        yield islice(samples, min(n, loader.batches_per_epoch))
    finally:
        samples.close()  # type: ignore[attr-defined]  # a generator: this stops the prefetch thread


def train_step(
    state: TrainState, sample: Sample, config: TrainConfig, device: torch.device, total_steps: int
) -> LossTerms:
    """One step of Eq. 2, with no synchronisation with the device."""
    training = config.training
    factor = lr_factor(training.schedule, state.step, total_steps, state.n_plateaus)
    for group in state.optimizer.param_groups:
        group["lr"] = training.lr * factor
    batch, targets = sample_to(sample, device)
    if config.pseudo_labels:
        targets = fill_labels(targets)
    outputs = forward(state, batch, config)
    # Heads and losses in float32, as in the official code.
    terms: LossTerms = state.objective(outputs, targets, batch, state.step / total_steps)
    state.optimizer.zero_grad(set_to_none=True)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    # With the slope the positions take a gradient too, for which nobody asks.
    terms.total.backward(inputs=parameters if state.objective.needs_gradient else None)
    if training.clip_grad_norm:
        nn.utils.clip_grad_norm_(parameters, training.clip_grad_norm)
    state.optimizer.step()
    if state.ema is not None and training.ema_decay:
        update_ema(state.ema, state.potential.model, state.step, training.ema_decay)
    return terms


def forward(state: TrainState, batch: Batch, config: TrainConfig) -> Outputs:
    """Return what the student gives for a batch, with everything that the losses need."""
    model, objective = state.potential.model, state.objective
    if objective.needs_gradient:
        batch = batch._replace(positions=batch.positions.detach().requires_grad_())
    with torch.autocast(batch.positions.device.type, torch.bfloat16, enabled=config.amp == "bf16"):
        outputs: Outputs = model(batch, objective.taps)
    if objective.needs_gradient:
        outputs["energy_gradient"] = energy_gradient(outputs, batch.positions, forces_from=model.forces_from)
    return outputs


def accumulate(state: TrainState, terms: LossTerms) -> None:
    """Add a step's losses to the sums of the next row of metrics.csv; stays on the device."""
    values = torch.stack([terms.total.detach(), *(p.detach() for p in terms.parts.values())]).double()
    state.sums = values if state.sums is None else state.sums + values
    state.n_summed += 1
