"""Before the first step: weights with which distillation pulls at the student as hard as the labels do.

Beyond the paper. At the fresh student, g_0 is the gradient of the loss on labels and g that of a distillation
loss, both with respect to the student's own weights (not the head's). Their norms, averaged over the first
batches, give lambda = mean |g_0| / mean |g|. The start value `auto` needs only the cache's statistics; this
sees how far from the weights a loss acts. Both leave lambda as it is from then on.
"""

import logging
import math

import torch
from torch import Tensor

from molkd.pipeline.config import TrainConfig
from molkd.pipeline.distill.loader import sample_to
from molkd.pipeline.distill.losses import fill_labels
from molkd.pipeline.distill.step import TrainState, first_samples, forward
from molkd.pipeline.errors import ConfigError

log = logging.getLogger(__name__)

_N_BATCHES = 8


def balance_weights(state: TrainState, config: TrainConfig) -> None:
    """Set the weight of every term that asks for `balance`; a run without such terms is left alone.

    Raises
    ------
    ConfigError
        If one of the gradients vanishes or is not finite, so that no weight would balance them.
    """
    terms = [term for term in config.kd if term.weight == "balance"]
    if not terms:
        return
    parameters = [p for p in state.potential.model.parameters() if p.requires_grad]
    labels: list[float] = []
    norms: dict[str, list[float]] = {term.label: [] for term in terms}
    with first_samples(state.loader, _N_BATCHES) as samples:
        for sample in samples:
            batch, targets = sample_to(sample, state.potential.device)
            targets = fill_labels(targets) if config.pseudo_labels else targets
            outputs = forward(state, batch, config)
            total = state.objective.labels_loss(outputs, targets).total
            labels.append(_gradient_norm(total, parameters))
            for term in terms:
                loss = state.objective.term_loss(term, outputs, targets, batch)
                norms[term.label].append(_gradient_norm(loss, parameters))
    for term in terms:
        weight = _mean(labels) / _mean(norms[term.label]) if _mean(norms[term.label]) else math.inf
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"--kd {term.label}=balance: the gradient of {'the labels' if weight == 0 else 'this loss'} "
                "vanishes or is not finite in the first batches; take auto or a number"
            )
        log.info("lambda(%s) = %.4g: it pulls as hard as the labels do", term.label, weight)
        state.objective.weights[term.label] = weight


def _gradient_norm(loss: Tensor, parameters: list[torch.nn.Parameter]) -> float:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return float(torch.stack([g.norm() for g in gradients if g is not None]).norm())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
