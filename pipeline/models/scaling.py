"""Fits a fresh model's scale factors to data: its activations then start with the variance they should have.

As in OCP: ``factor = sqrt(var(reference) / var(x))``, with 1 where there is no reference, var being averaged
over batches by their rows. Different from OCP:

- The variance is that of all rows and channels of a batch together. OCP takes it within each channel; where
  all atoms are alike, as in a metal, that is next to nothing, and factors of 10 start a model far off.
- Rows of zeros, where there is no neighbor, triplet or quadruplet, do not count.
- One pass fits all factors instead of one pass each: while a batch passes, each factor takes that batch's
  own ratio, so that what lies behind it sees scaled values at once.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molkd.pipeline.graphs.batch import Batch, to_device
from molkd.pipeline.models.ocp_blocks import ScaleFactor, scale_factors

log = logging.getLogger(__name__)

_ROUNDING = 1e-12  # a variance below this share of the mean square is float32 rounding of a constant


@dataclass(eq=False)
class _Watcher:
    """Sums over batches of what one scale factor is given."""

    factor: ScaleFactor
    fits: bool  # whether the factor takes each batch's own ratio
    variance: float = 0.0  # of x, times rows
    target: float = 0.0  # what it should be, times rows

    @torch.no_grad()
    def __call__(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Look at the arguments of the factor's `forward`."""
        rows = x.flatten(0, -2)  # (M, C)
        count = (rows != 0).any(dim=1)
        variance, target = _variance(rows[count]), 1.0
        if reference is not None:
            aims = reference.flatten(0, -2)
            target = _variance(aims[count if len(aims) == len(rows) else (aims != 0).any(dim=1)])
        if variance > 0 and target > 0:
            n_rows = int(count.sum())
            self.variance += n_rows * variance
            self.target += n_rows * target
        if self.fits:
            self.factor.scale_factor.fill_(math.sqrt(target / variance) if variance > 0 else 0.0)

    def fitted(self) -> float:
        """Return the factor from all batches; 0 if there was nothing to fit it on."""
        return math.sqrt(self.target / self.variance) if self.target else 0.0

    def ratio(self) -> float:
        """Return the variance behind the factor over what it should be; NaN if there was nothing to scale."""
        return float(self.factor.scale_factor) ** 2 * self.variance / self.target if self.target else math.nan


def fit_scale_factors(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Fit all scale factors of a model that has none fitted yet; any other model is left alone.

    A factor that never gets anything but zeros or one constant (quadruplets of diatomic molecules) stays 0,
    which scales nothing; a warning names it.

    Parameters
    ----------
    model : a Model; its weights stay as they are
    batches : on any device; read only if there is something to fit, and then kept in memory

    Returns
    -------
    dict
        By name of the factor, the variance behind it over what it should be, measured in a second pass: 1 is
        perfect. Empty if nothing was fitted.
    """
    factors = scale_factors(model)
    if not factors or any(float(factor.scale_factor) != 0 for factor in factors.values()):
        return {}
    kept = list(batches)
    fits = _watch(model, factors, kept, fits=True)
    for watcher in fits.values():
        watcher.factor.scale_factor.data.fill_(watcher.fitted())
    seen = _watch(model, factors, kept, fits=False)
    ratios = {name: seen[name].ratio() for name, factor in factors.items() if float(factor.scale_factor)}
    unfitted = [name for name in factors if name not in ratios]
    if unfitted:
        log.warning(
            "%d of %d scale factors are not fitted and scale nothing: %s. In %d batches their input is "
            "empty or constant: the data have no such neighbors, triplets or quadruplets",
            len(unfitted),
            len(factors),
            ", ".join(unfitted),
            len(kept),
        )
    if ratios:
        values = [float(factors[name].scale_factor) for name in ratios]
        log.info(
            "%d scale factors fitted on %d batches: %.3g to %.3g; variances behind them are now %.3f to %.3f "
            "of what they should be",
            len(ratios),
            len(kept),
            min(values),
            max(values),
            min(ratios.values()),
            max(ratios.values()),
        )
    return ratios


def _watch(
    model: nn.Module, factors: Mapping[str, ScaleFactor], batches: list[Batch], *, fits: bool
) -> dict[str, _Watcher]:
    """Run the batches and return what each factor was given."""
    watchers = {name: _Watcher(factor, fits) for name, factor in factors.items()}
    device = next(iter(factors.values())).scale_factor.device
    # A gradient passes no factor that the energy has not passed.
    has_force_head = model.forces_from == "direct"
    with _in_front(watchers.values()), _evaluating(model), torch.no_grad():
        for batch in batches:
            model(to_device(batch, device), forces=has_force_head)
    return watchers


@contextmanager
def _in_front(watchers: Iterable[_Watcher]) -> Iterator[None]:
    def hook(watcher: _Watcher) -> Any:
        return lambda _, args, kwargs: watcher(*args, **kwargs)

    handles = [w.factor.register_forward_pre_hook(hook(w), with_kwargs=True) for w in watchers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _variance(rows: Tensor) -> float:
    """Return the variance of all entries of (M, C); 0 if there is none but rounding."""
    if rows.numel() < 2:
        return 0.0
    variance, scale = float(rows.var()), float(rows.square().mean())
    return variance if _ROUNDING * scale < variance < math.inf else 0.0
