"""Before the first step: the student's scale factors are fitted to the batches that training begins with."""

import copy
from itertools import islice

from molkd.pipeline.distill.step import TrainState
from molkd.pipeline.models.scaling import fit_scale_factors

_N_BATCHES = 16  # OCP's number


def fit_on_first_batches(state: TrainState) -> None:
    """Fit the student and give its average the same factors; training still begins with the first batch."""
    loader = copy.copy(state.loader)  # with a place of its own in the stream
    samples = iter(loader)
    batches = (sample.batch for sample in islice(samples, min(_N_BATCHES, loader.batches_per_epoch)))
    try:
        fit_scale_factors(state.potential.model, batches)
    finally:
        samples.close()  # type: ignore[attr-defined]  # a generator: this stops the prefetch thread
    if state.ema is not None:  # nothing is averaged yet
        state.ema.load_state_dict(state.potential.model.state_dict())
