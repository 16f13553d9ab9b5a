"""A run begins by fitting the student's scale factors, once, and ends with them in its model file."""

import numpy as np
import pytest
import torch
from distill_cases import PAINN, ids_of, interrupt_after, train_config

from molkd.cache_schema.reader import Cache
from molkd.pipeline.distill import scale_factors
from molkd.pipeline.distill.scale_factors import fit_on_first_batches
from molkd.pipeline.distill.step import initial_state
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.models.ocp_blocks import ScaleFactor
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import load_preset

CPU = torch.device("cpu")
GEMNET_OC = load_preset("gemnet-oc-tiny", periodic=False)["model"]


def factors_of(model):
    return {n: float(m.scale_factor) for n, m in model.named_modules() if isinstance(m, ScaleFactor)}


def state_of(store, out, **changes):
    config = train_config(store, out, **changes)
    cache = Cache.open(config.store)
    return initial_state(cache, prepare(cache, config, CPU), config, CPU)


@pytest.fixture
def counted(monkeypatch):
    """Numbers of batches of each fit."""
    calls: list[int] = []
    fit = scale_factors.fit_scale_factors

    def counting(model, batches):
        kept = list(batches)
        calls.append(len(kept))
        return fit(model, kept)

    monkeypatch.setattr(scale_factors, "fit_scale_factors", counting)
    return calls


@pytest.mark.parametrize("model", [PAINN, GEMNET_OC], ids=["painn", "gemnet-oc"])
def test_model_and_average_start_with_the_same_fitted_factors(store, tmp_path, model):
    state = state_of(store, tmp_path, model=model)
    fit_on_first_batches(state)
    factors = factors_of(state.potential.model)
    assert len(factors) == (2 if model is PAINN else 28)
    assert min(factors.values()) > 0
    assert factors_of(state.ema) == factors


def test_training_begins_with_the_first_batch_all_the_same(store, tmp_path):
    fitted, fresh = (state_of(store, tmp_path) for _ in range(2))
    fit_on_first_batches(fitted)
    assert fitted.loader.state_dict() == {"epoch": 0, "batch_in_epoch": 0}
    samples = [iter(state.loader) for state in (fitted, fresh)]
    for _ in range(3):
        assert len({tuple(ids_of(next(stream))) for stream in samples}) == 1
    for stream in samples:
        stream.close()


@pytest.mark.parametrize(("batch_size", "n_batches"), [(2, 16), (16, 3)])
def test_as_many_batches_as_ocp_takes_but_no_system_twice(store, tmp_path, counted, batch_size, n_batches):
    state = state_of(store, tmp_path, training={"batch_size": batch_size})
    fit_on_first_batches(state)
    assert counted == [n_batches]
    assert np.ceil(state.loader.subset.sum() / batch_size) >= n_batches


def test_factors_rest_while_weights_move_and_are_not_fitted_again(store, tmp_path, counted, monkeypatch):
    started = state_of(store, tmp_path / "other")
    fit_on_first_batches(started)
    config = train_config(store, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert not train_student(config).finished
    assert train_student(config).finished
    assert len(counted) == 2  # of `started` and of the run: resuming did not fit
    best = Potential.load(tmp_path / "run").model
    assert factors_of(best) == factors_of(started.potential.model)
    weights = [dict(m.named_parameters())["out_energy.0.weight"] for m in (best, started.potential.model)]
    assert not torch.equal(*weights)
