"""Weights that balance gradients, and terms that fade."""

import pytest
import torch
from distill_cases import column, interrupt_after, read_summary, train_config

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm, make_config, parse_kd
from molkd.pipeline.distill.balance import balance_weights
from molkd.pipeline.distill.heads import make_heads
from molkd.pipeline.distill.losses import Targets
from molkd.pipeline.distill.objective import Objective, fade_factor
from molkd.pipeline.distill.scale_factors import fit_on_first_batches
from molkd.pipeline.distill.step import first_samples, initial_state
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.models.potential import Potential

CPU = torch.device("cpu")
BALANCED = [{"name": "n2n", "weight": "balance"}, {"name": "v2v", "weight": "balance"}]


def state_of(store, out, **changes):
    config = train_config(store, out, **changes)
    cache = Cache.open(config.store)
    state = initial_state(cache, prepare(cache, config, CPU), config, CPU)
    fit_on_first_batches(state)
    return state, config


def norm_by_backward(state, loss_of):
    """Mean over the first eight batches (an epoch of six here) of the norm of all weights' gradients."""
    norms = []
    with first_samples(state.loader, 8) as samples:
        for batch, targets in samples:
            state.potential.model.zero_grad()
            loss_of(state.potential.model(batch, state.objective.taps), targets).backward()
            gradients = [p.grad.flatten() for p in state.potential.model.parameters() if p.grad is not None]
            norms.append(torch.cat(gradients).norm().item())
    return sum(norms) / len(norms)


def test_each_balanced_term_pulls_as_hard_as_the_labels_do(store, tmp_path):
    """By backward() on the very terms: lambda times the norm of its gradient is the norm of that of L_0."""
    state, config = state_of(store, tmp_path, kd=[*BALANCED, {"name": "vanilla2", "weight": 3.0}])
    balance_weights(state, config)
    objective = state.objective
    labels = norm_by_backward(state, lambda out, t: objective.labels_loss(out, t).total)
    for term in config.kd[:2]:
        alone = norm_by_backward(state, lambda out, t, term=term: objective.term_loss(term, out, t))
        assert objective.weights[term.label] * alone == pytest.approx(labels, rel=1e-4)
    assert objective.weights["vanilla2"] == 3.0


def test_balancing_moves_neither_weights_nor_the_stream(store, tmp_path):
    state, config = state_of(store, tmp_path, kd=BALANCED)
    before = [p.detach().clone() for p in state.potential.model.parameters()]
    balance_weights(state, config)
    assert all(torch.equal(p, b) for p, b in zip(state.potential.model.parameters(), before, strict=True))
    assert state.loader.state_dict() == {"epoch": 0, "batch_in_epoch": 0}


def test_a_continued_run_keeps_its_balanced_weights_and_writes_them_down(store, tmp_path, monkeypatch):
    """The same model comes out, stopped half-way or not."""
    whole = train_student(train_config(store, tmp_path / "whole", kd=BALANCED))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert not train_student(train_config(store, tmp_path / "cut", kd=BALANCED)).finished
    cut = train_student(train_config(store, tmp_path / "cut", kd=BALANCED))
    weights = read_summary(tmp_path / "cut")["kd"]
    assert weights == read_summary(tmp_path / "whole")["kd"]
    assert all(0 < weight < float("inf") for weight in weights.values())
    assert cut.val == whole.val
    kept = Potential.load(tmp_path / "cut").metadata["provenance"]["kd"]
    assert {term["label"]: term["weight"] for term in kept} == weights


def test_without_labels_there_is_nothing_to_balance_against(bare_store, tmp_path):
    changes = {"kd": [{"name": "vanilla1", "weight": 1.0}, *BALANCED], "val_fraction": 0}
    state, config = state_of(bare_store, tmp_path, **changes)
    with pytest.raises(ConfigError, match="gradient of the labels vanishes"):
        balance_weights(state, config)


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 1.0), (0.2, 1.0), (0.3, 0.853553), (0.4, 0.5), (0.6, 0.0), (1.0, 0.0)]
)
def test_a_term_fades_along_half_a_cosine(progress, expected):
    """cos(pi / 4) = 0.707107 a quarter of the way."""
    assert fade_factor(KDTerm(name="n2n", fade=(0.2, 0.6)), progress) == pytest.approx(expected, abs=1e-6)
    assert fade_factor(KDTerm(name="n2n"), progress) == 1.0


def test_fade_at_one_point_is_a_step():
    assert [fade_factor(KDTerm(name="n2n", fade=(0.5, 0.5)), p) for p in (0.4999, 0.5)] == [1.0, 0.0]


def test_objective_counts_a_faded_term_less_and_logs_it_whole():
    targets = Targets(
        torch.tensor([1.0]), torch.zeros(1, 3), torch.tensor([True]), {"atomic_energies": torch.ones(1)}
    )
    outputs = {
        "energy": torch.zeros(1),
        "forces": torch.zeros(1, 3),
        "atomic_energies": torch.full((1,), 4.0),
    }
    term = KDTerm(name="vanilla2", fade=(0.0, 1.0))
    objective = Objective((term,), {"vanilla2": 2.0}, make_heads((), {}, {}), 1.0, 100.0)
    total, parts = objective(outputs, targets, progress=0.5)
    assert parts["vanilla2"].item() == pytest.approx(3.0)
    assert total.item() == pytest.approx(1 + 0.5 * 2.0 * 3.0)


def test_a_term_that_has_faded_is_logged_and_costs_no_backward_pass():
    """Not even where it is infinite."""
    targets = Targets(
        torch.tensor([1.0]), torch.zeros(1, 3), torch.tensor([True]), {"atomic_energies": torch.ones(1)}
    )
    energies = torch.tensor([float("inf")], requires_grad=True)
    outputs = {
        "energy": torch.zeros(1, requires_grad=True),
        "forces": torch.zeros(1, 3),
        "atomic_energies": energies,
    }
    term = KDTerm(name="vanilla2", fade=(0.0, 0.5))
    objective = Objective((term,), {"vanilla2": 2.0}, make_heads((), {}, {}), 1.0, 100.0)
    total, parts = objective(outputs, targets, progress=0.5)
    total.backward()
    assert total.item() == 1.0
    assert parts["vanilla2"].item() == float("inf")
    assert energies.grad is None


def test_a_run_fades_over_its_own_length(store, tmp_path):
    """The total of the last rows is the loss on labels alone."""
    kd = [{"name": "n2n", "weight": 2.0, "fade": [0.25, 0.5]}]
    train_student(train_config(store, tmp_path / "run", kd=kd))
    names = ("train_loss", "train_energy", "train_forces", "train_n2n")
    loss, energy, forces, n2n = (column(tmp_path / "run", name) for name in names)
    extra = [(t - e - 100 * f) / n for t, e, f, n in zip(loss, energy, forces, n2n, strict=True)]
    assert extra[:3] == pytest.approx([2.0] * 3, rel=1e-3)
    assert extra[6:] == pytest.approx([0.0] * 6, abs=1e-3)


@pytest.mark.parametrize("text", ["n2n=balance", "grad=auto,fade=0.5:0.8", "v2v=3,head=identity,fade=0:1"])
def test_text_of_a_term_reads_back(text):
    (term,) = (make_config(KDTerm, values) for values in parse_kd([text]))
    assert term.text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n2n=1,fade=0.8:0.5", "two shares of the run"),
        ("n2n=1,fade=0.5:1.5", "two shares of the run"),
        ("n2n=1,fade=0.5", "fade"),
        ("grad=1,head=mlp", "neither head nor loss"),
        ("n2n=heavy", "a number, auto or balance"),
    ],
)
def test_what_makes_no_sense_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        [make_config(KDTerm, values) for values in parse_kd([text])]
