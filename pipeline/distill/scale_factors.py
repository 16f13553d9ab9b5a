"""Before the first step: the student's scale factors are fitted to the batches that training begins with."""

from molkd.pipeline.distill.step import TrainState, first_samples
from molkd.pipeline.models.scaling import fit_scale_factors

_N_BATCHES = 16  # OCP's number


def fit_on_first_batches(state: TrainState) -> None:
    """Fit the student and give its average the same factors; training still begins with the first batch."""
    with first_samples(state.loader, _N_BATCHES) as samples:
        fit_scale_factors(state.potential.model, (sample.batch for sample in samples))
    if state.ema is not None:  # nothing is averaged yet
        state.ema.load_state_dict(state.potential.model.state_dict())
