"""Scale factors: fitted as OCP defines them, variances near one behind them, nothing else touched."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from molkd.pipeline.data.sources import open_source
from molkd.pipeline.data.system import System
from molkd.pipeline.graphs.batch import batch_from_systems
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.models.ocp_blocks import ScaleFactor
from molkd.pipeline.models.registry import build_model, load_preset
from molkd.pipeline.models.scaling import fit_scale_factors

COLL = Path(__file__).parents[1] / "data" / "coll_small.extxyz"  # 48 frames of 3 to 10 atoms
RULE = NeighborRule(4.0, 20)
PAINN = {"name": "painn", "hidden_channels": 32, "num_rbf": 16, "cutoff": 5.0, "use_pbc": False}
FITTED = {
    "gemnet-oc-tiny": load_preset("gemnet-oc-tiny", periodic=False)["model"],
    "painn-tiny": load_preset("painn-tiny", periodic=False)["model"],
    "painn-6-layers": PAINN | {"num_layers": 6},
    "painn-gradient": PAINN | {"num_layers": 3, "direct_forces": False},
}
# One pass scales by each batch's own ratio, later by the ratio of all: 0.2 % for PaiNN, 1.2 % for GemNet-OC.
NEAR_ONE = 0.03


def read_systems():
    source = open_source(COLL)
    try:
        return [source.read(i) for i in range(len(source))]
    finally:
        source.close()


def make_batches(rule, size=8):
    systems = read_systems()
    return [batch_from_systems(systems[i : i + size], rule) for i in range(0, len(systems), size)]


def make_system(positions):
    """Atoms of molybdenum in open space."""
    n_atoms = len(positions)
    return System(
        atomic_numbers=np.full(n_atoms, 42, np.uint8),
        positions=positions,
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        energy=0.0,
        forces=np.zeros((n_atoms, 3)),
        tags=np.zeros(n_atoms, np.uint8),
        fixed=np.zeros(n_atoms, bool),
        source="molybdenum",
    )


def make_model(settings):
    torch.manual_seed(3)
    return build_model(settings)


def factors_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, ScaleFactor)}


def variance(rows):
    """Over rows that are not zero and channels."""
    rows = rows.detach().double().numpy()
    return float(np.var(rows[np.abs(rows).max(axis=1) > 0], ddof=1))


def measure(model, batches):
    """Return, per factor, the variance of what it gets, what it gives, and what it should give."""
    sums: dict[str, np.ndarray] = {}
    n_rows: dict[str, int] = {}

    def look(name, args, kwargs, output):
        x, output = args[0].flatten(0, -2), output.flatten(0, -2)
        reference = kwargs.get("reference", args[1] if len(args) > 1 else None)
        target = 1.0
        if reference is not None:
            reference = reference.flatten(0, -2)
            target = variance(reference[x.any(dim=1)] if len(reference) == len(x) else reference)
        n = int(x.any(dim=1).sum())
        sums[name] = sums.get(name, 0) + n * np.array([variance(x), variance(output), target])
        n_rows[name] = n_rows.get(name, 0) + n

    def hook(name):
        return lambda _, args, kwargs, output: look(name, args, kwargs, output)

    handles = [f.register_forward_hook(hook(n), with_kwargs=True) for n, f in factors_of(model).items()]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: total / n_rows[name] for name, total in sums.items()}


class Toy(nn.Module):
    """Positions through a factor, then through one that has those positions as reference."""

    forces_from = "direct"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.first = ScaleFactor()
        self.second = ScaleFactor()
        self.never = ScaleFactor()

    def forward(self, batch, taps=(), *, forces=True):
        x = self.first(batch.positions)
        return {"node": self.second(3 * x * self.weight, reference=batch.positions)}


@pytest.mark.parametrize("name", FITTED)
def test_variances_end_near_one(name):
    model = make_model(FITTED[name])
    batches = make_batches(model.neighbor_rule)
    before = [entering for entering, _, _ in measure(model, batches).values()]
    reported = fit_scale_factors(model, batches)
    assert max(abs(v - 1) for v in before) > 0.5  # there was something to do
    measured = measure(model, batches)
    assert reported.keys() == measured.keys() == factors_of(model).keys()
    for factor, (_, after, target) in measured.items():
        assert after / target == pytest.approx(1, abs=NEAR_ONE)
        assert reported[factor] == pytest.approx(after / target, rel=1e-4)


def test_one_pass_gives_the_factors_of_one_pass_per_factor():
    model = make_model(FITTED["painn-6-layers"])
    batches = make_batches(model.neighbor_rule)
    expected = {}
    for name, factor in factors_of(model).items():  # in the order of execution
        entering, _, target = measure(model, batches)[name]
        expected[name] = math.sqrt(target / entering)
        factor.scale_factor.data.fill_(expected[name])
    for factor in factors_of(model).values():
        factor.scale_factor.data.zero_()
    fit_scale_factors(model, batches)
    for name, factor in factors_of(model).items():
        assert float(factor.scale_factor) == pytest.approx(expected[name], rel=0.01)


def test_batches_count_by_their_rows_and_references_set_the_aim(caplog):
    systems = read_systems()[:5]
    batches = [batch_from_systems(part, RULE) for part in (systems[:4], systems[4:])]
    model = Toy()
    fit_scale_factors(model, batches)
    rows = np.array([b.n_atoms for b in batches])
    per_batch = np.array([variance(b.positions) for b in batches])
    mean = (rows * per_batch).sum() / rows.sum()
    assert float(model.first.scale_factor) == pytest.approx(1 / math.sqrt(mean), rel=1e-5)
    # While fitted, what enters the second has variance 9 in each batch.
    assert float(model.second.scale_factor) == pytest.approx(math.sqrt(mean) / 3, rel=1e-5)


def test_without_quadruplets_only_their_factors_stay(caplog):
    model = make_model(FITTED["gemnet-oc-tiny"] | {"qint_tags": [1, 2]})  # all tags are 0
    ratios = fit_scale_factors(model, make_batches(model.neighbor_rule))
    unfitted = {name for name, factor in factors_of(model).items() if float(factor.scale_factor) == 0}
    scales = ("scale_rbf", "scale_cbf", "scale_sbf_sum")
    assert unfitted == {f"int_blocks.{i}.quad_interaction.{scale}" for i in range(2) for scale in scales}
    assert ratios.keys() == factors_of(model).keys() - unfitted
    assert all(name in caplog.text for name in unfitted)


def test_what_has_nothing_to_scale_stays_and_is_named_once(caplog):
    """Atoms without neighbors: no edge of GemNet-OC has anything to say."""
    model = make_model(FITTED["gemnet-oc-tiny"])
    alone = make_system(np.zeros((1, 3)))
    with caplog.at_level(logging.WARNING):
        assert fit_scale_factors(model, [batch_from_systems([alone] * 4, model.neighbor_rule)]) == {}
    assert all(float(factor.scale_factor) == 0 for factor in factors_of(model).values())
    (record,) = caplog.records
    assert ", ".join(factors_of(model)) in record.message
    assert "constant" in record.message


def test_equal_atoms_do_not_blow_a_model_up():
    """In a metal the atoms differ little within a channel; the channels differ all the same."""
    model = make_model(FITTED["painn-6-layers"])
    rng = np.random.default_rng(0)
    grid = 2.7 * np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)
    crystals = [make_system(grid + rng.normal(0, 0.02, grid.shape)) for _ in range(4)]
    batch = batch_from_systems(crystals, model.neighbor_rule)
    fit_scale_factors(model, [batch])
    factors = [float(factor.scale_factor) for factor in factors_of(model).values()]
    assert 0.5 < min(factors) < max(factors) < 2
    assert model(batch)["node"].square().mean() < 2


def test_a_factor_that_is_never_reached_does_not_stop_the_others(caplog):
    model = Toy()
    ratios = fit_scale_factors(model, make_batches(RULE))
    assert ratios.keys() == {"first", "second"}
    assert float(model.never.scale_factor) == 0
    assert "1 of 3 scale factors" in caplog.text
    assert "never" in caplog.text


def test_fitted_models_and_models_without_factors_are_left_alone():
    def forbidden():
        raise AssertionError("no batch is needed")
        yield

    model = make_model(FITTED["painn-6-layers"])
    factors_of(model)["upd_out_scalar_scale_2"].scale_factor.data.fill_(0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fit_scale_factors(model, forbidden()) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (
        fit_scale_factors(make_model(load_preset("schnet-tiny", periodic=False)["model"]), forbidden()) == {}
    )


@pytest.mark.parametrize("name", ["painn-tiny", "painn-gradient"])
def test_only_the_factors_change_and_the_same_way_every_time(name):
    models = [make_model(FITTED[name]) for _ in range(2)]
    before = {key: value.clone() for key, value in models[0].state_dict().items()}
    batches = make_batches(models[0].neighbor_rule)
    models[0].train()
    models[1].eval()
    for model in models:
        fit_scale_factors(model, batches)
    assert models[0].training
    assert not models[1].training
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key])
        assert torch.equal(value, before[key]) is ("scale_factor" not in key)
    assert all(p.grad is None for p in models[0].parameters())
    factor = next(iter(factors_of(models[0]).values()))
    assert not factor.scale_factor.requires_grad
    x = torch.randn(4, 3)
    fitted = factor.scale_factor.clone()
    torch.testing.assert_close(factor(x), x * fitted)  # no longer watched: another input changes nothing
    assert torch.equal(factor.scale_factor, fitted)
