"""Weights of systems in every loss, worked out by hand: sums of weight x error over the unweighted count."""

import math

import pytest
import torch
from distill_cases import spread_weights

from molkd.cache_schema.fields import edge_spec, node_spec, v2v_spec
from molkd.pipeline.config import KDTerm
from molkd.pipeline.distill.heads import make_heads
from molkd.pipeline.distill.losses import (
    Targets,
    energy_loss,
    feature_loss,
    fill_labels,
    forces_loss,
)
from molkd.pipeline.distill.objective import Objective

NAN = math.nan
# Two systems of 1 and 2 atoms with 2 and 1 edges; the second counts a quarter as much as the first.
WEIGHTS = spread_weights(torch.tensor([1.6, 0.4]), torch.tensor([1, 2]), torch.tensor([2, 1]))
FORCES = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0], [1.0, 2.0, 2.0]])  # 5, 2 and 3 long
FREE = torch.tensor([True, True, True])
TERMS = (
    KDTerm(name="n2n", head="identity"),
    KDTerm(name="v2v", head="identity", loss="mae"),
    KDTerm(name="e2e", head="identity"),
    KDTerm(name="vanilla1"),
    KDTerm(name="vanilla2"),
)


def test_a_weight_goes_to_every_atom_and_edge_of_its_system():
    torch.testing.assert_close(WEIGHTS.atoms, torch.tensor([1.6, 0.4, 0.4]))
    torch.testing.assert_close(WEIGHTS.edges, torch.tensor([1.6, 1.6, 0.4]))


def test_energies_are_weighted_over_the_count_of_labels():
    predicted = torch.tensor([1.0, 5.0, -2.0], requires_grad=True)
    loss = energy_loss(predicted, torch.tensor([0.5, NAN, 1.0]), torch.tensor([0.4, 7.0, 1.6]))
    loss.backward()
    assert loss.item() == pytest.approx((0.4 * 0.5 + 1.6 * 3.0) / 2)
    assert predicted.grad.tolist() == pytest.approx([0.4 / 2, 0, -1.6 / 2])


def test_forces_are_weighted_by_the_system_of_the_atom():
    predicted = torch.zeros(3, 3, requires_grad=True)
    free = torch.tensor([True, False, True])
    loss = forces_loss(predicted, FORCES, free, WEIGHTS.atoms)
    loss.backward()
    assert loss.item() == pytest.approx((1.6 * 5 + 0.4 * 3) / 2)
    expected = torch.stack([-1.6 / 2 * FORCES[0] / 5, torch.zeros(3), -0.4 / 2 * FORCES[2] / 3])
    torch.testing.assert_close(predicted.grad, expected)


@pytest.mark.parametrize(("kind", "expected"), [("mse", 1.6 * 10 + 0.4 * 5), ("mae", 1.6 * 4 + 0.4 * 3)])
def test_features_are_weighted_by_row(kind, expected):
    mapped = torch.tensor([[1.0, -3.0], [0.0, 0.0], [1.0, 2.0]])
    assert feature_loss(mapped, torch.zeros(3, 2), kind, WEIGHTS.atoms).item() == pytest.approx(expected / 6)


def test_the_mse_is_that_of_both_sides_times_the_root_of_the_weight():
    """The official code's way to weigh an MSE."""
    mapped, target = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    root = WEIGHTS.atoms.sqrt()[:, None, None]
    torch.testing.assert_close(
        feature_loss(mapped, target, "mse", WEIGHTS.atoms), feature_loss(root * mapped, root * target, "mse")
    )


def objective():
    specs = {"node": node_spec(1), "v2v": v2v_spec(1), "edge": edge_spec(1)}
    scalars = {name: node_spec(1, name) for name in ("energy", "forces", "atomic_energies")}
    return Objective(
        TERMS, {t.label: 1.0 for t in TERMS}, make_heads(TERMS, specs, specs | scalars), 1.0, 10.0
    )


def outputs():
    return {
        "energy": torch.zeros(2),
        "forces": torch.zeros(3, 3),
        "node": torch.tensor([[1.0], [2.0], [3.0]]),
        "v2v": torch.tensor([[[1.0], [1.0], [0.0]], [[0.0], [0.0], [0.0]], [[3.0], [0.0], [0.0]]]),
        "edge": torch.tensor([[1.0], [2.0], [3.0]]),
        "atomic_energies": torch.tensor([1.0, 2.0, 3.0]),
    }


def targets(**changes):
    teacher = {
        "energy": torch.tensor([3.0, 1.0]),
        "forces": 2 * FORCES,
        "node": torch.zeros(3, 1),
        "v2v": torch.zeros(3, 3, 1),
        "edge": torch.zeros(3, 1),
        "atomic_energies": torch.zeros(3),
    }
    return Targets(
        **{"energy": torch.tensor([2.0, NAN]), "forces": FORCES, "free": FREE, "teacher": teacher, **changes}
    )


def test_every_term_of_the_objective_is_weighted():
    parts = objective()(outputs(), targets(weights=WEIGHTS)).parts
    expected = {
        "energy": 1.6 * 2,  # one labelled system
        "forces": (1.6 * 5 + 0.4 * (2 + 3)) / 3,
        "n2n,head=identity": (1.6 * 1 + 0.4 * (4 + 9)) / 3,
        "v2v,head=identity,loss=mae": (1.6 * 2 + 0.4 * 3) / 9,
        "e2e,head=identity": (1.6 * (1 + 4) + 0.4 * 9) / 3,
        "vanilla1": (1.6 * 3 + 0.4 * 1) / 2 + 10 * (1.6 * 10 + 0.4 * (4 + 6)) / 3,
        "vanilla2": (1.6 * 1 + 0.4 * (2 + 3)) / 3,
    }
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(expected)


def test_weights_of_one_change_nothing():
    ones = spread_weights(torch.ones(2), torch.tensor([1, 2]), torch.tensor([2, 1]))
    plain, weighted = (objective()(outputs(), targets(weights=w)).total for w in (None, ones))
    assert torch.equal(plain, weighted)


def test_a_weight_of_zero_leaves_no_trace():
    only_first = spread_weights(torch.tensor([1.0, 0.0]), torch.tensor([1, 2]), torch.tensor([2, 1]))
    student = {name: values.requires_grad_() for name, values in outputs().items()}
    objective()(student, targets(weights=only_first)).total.backward()
    for name, values in student.items():
        n_first = 2 if name == "edge" else 1
        assert (values.grad[n_first:] == 0).all()
        assert (values.grad[:n_first] != 0).any()


def test_pseudo_labels_keep_their_weights():
    filled = fill_labels(targets(weights=WEIGHTS))
    loss = energy_loss(torch.zeros(2), filled.energy, filled.weights.systems)
    assert loss.item() == pytest.approx((1.6 * 2 + 0.4 * 1) / 2)
