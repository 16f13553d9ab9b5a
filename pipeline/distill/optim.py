"""How the weights move: AdamW, the paper's learning-rate schedules and the moving average of weights."""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from molkd.pipeline.config import ScheduleConfig, TrainingConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over everything that requires a gradient."""
    return torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=config.lr,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
        eps=config.adam_eps,
        fused=True,  # on CPU too: a small student spends a sixth of its step in the loop over weights
    )


def lr_factor(schedule: ScheduleConfig, step: int, total_steps: int, n_plateaus: int = 0) -> float:
    """Return what the initial learning rate is multiplied by at `step` (0 is the first).

    The product of a warm-up that rises linearly from `warmup_factor` to 1 and, by kind, of
    ``decay_rate ** (step / decay_steps)``, ``gamma ** (milestones passed)`` or ``gamma ** n_plateaus``.
    """
    done = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    factor = schedule.warmup_factor + (1 - schedule.warmup_factor) * done
    if schedule.kind == "warmup_exponential":
        factor *= schedule.decay_rate ** (step / (schedule.decay_steps or total_steps))
    elif schedule.kind == "warmup_milestones":
        factor *= schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    elif schedule.kind == "plateau":
        factor *= schedule.gamma**n_plateaus
    return factor


def count_plateaus(n_stale: int, n_plateaus: int, *, is_best: bool, patience: int) -> tuple[int, int]:
    """Count a validation: more than `patience` in a row that are no better make a plateau.

    Parameters
    ----------
    n_stale : validations since the best one or the last plateau
    """
    n_stale = 0 if is_best else n_stale + 1
    return (0, n_plateaus + 1) if n_stale > patience else (n_stale, n_plateaus)


def make_ema(model: nn.Module) -> nn.Module:
    """Return a copy of a model that is to hold the moving average of its weights."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def update_ema(ema: nn.Module, model: nn.Module, n_updates: int, decay: float) -> None:
    """Move the average towards the weights; a young one forgets faster: decay <= (1 + n) / (10 + n).

    Parameters
    ----------
    n_updates : updates before this one; counted on the host, so that no step waits for the device
    """
    weight = 1.0 - min(decay, (1 + n_updates) / (10 + n_updates))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)
