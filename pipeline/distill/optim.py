"""How the weights move: AdamW, the paper's learning-rate schedules and the moving average of weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from molkd.pipeline.config import ScheduleConfig, TrainingConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over everything that requires a gradient."""
    return torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=config.lr,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
        eps=config.adam_eps,
    )


def lr_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return what the initial learning rate is multiplied by at `step` (0 is the first).

    The product of a warm-up that rises linearly from `warmup_factor` to 1 and, by kind, of
    ``decay_rate ** (step / decay_steps)`` or ``gamma ** (milestones passed)``.
    """
    done = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    factor = schedule.warmup_factor + (1 - schedule.warmup_factor) * done
    if schedule.kind == "warmup_exponential":
        factor *= schedule.decay_rate ** (step / (schedule.decay_steps or total_steps))
    elif schedule.kind == "warmup_milestones":
        factor *= schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    return factor


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Return a moving average of the weights; a young one forgets faster: decay <= (1 + n) / (10 + n)."""

    def average(averaged: Tensors, current: Tensors, n_averaged: Tensor | int) -> None:
        n = int(n_averaged)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=average)
