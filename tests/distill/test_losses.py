"""The losses of Eqs. 1, 2, 4 and 6 to 8 against numbers worked out by hand."""

import math

import pytest
import torch

from molkd.cache_schema.fields import edge_spec, node_spec, v2v_spec
from molkd.pipeline.config import KDTerm
from molkd.pipeline.distill.heads import make_heads
from molkd.pipeline.distill.losses import (
    Targets,
    base_loss,
    energy_loss,
    feature_loss,
    fill_labels,
    forces_loss,
    vanilla1_loss,
    vanilla2_loss,
)
from molkd.pipeline.distill.objective import Objective

NAN = math.nan
ENERGY = torch.tensor([1.0, 5.0, -2.0])
ENERGY_LABEL = torch.tensor([0.5, NAN, 1.0])  # errors 0.5 and 3, the second system has no label
FORCES_LABEL = torch.tensor(
    [
        [3.0, 4.0, 0.0],  # 5 long
        [0.0, 0.0, 9.0],  # fixed
        [NAN, NAN, NAN],
        [1.0, -2.0, 2.0],  # 3 long
        [NAN, 1.0, 1.0],  # one component missing: the atom has no label
    ]
)
FREE = torch.tensor([True, False, True, True, True])


def targets(**changes):
    values = {"energy": ENERGY_LABEL, "forces": FORCES_LABEL, "free": FREE, "teacher": {}}
    return Targets(**(values | changes))


def outputs(energy=ENERGY, forces=None, **more):
    forces = torch.zeros(len(FREE), 3) if forces is None else forces
    return {"energy": energy, "forces": forces, **more}


def test_energy_loss_is_the_mean_over_labelled_systems():
    assert energy_loss(ENERGY, ENERGY_LABEL).item() == pytest.approx((0.5 + 3.0) / 2)


def test_forces_loss_is_the_mean_length_over_free_labelled_atoms():
    assert forces_loss(torch.zeros(5, 3), FORCES_LABEL, FREE).item() == pytest.approx((5 + 3) / 2)


def test_forces_loss_weighs_atoms_alike_however_large_their_system():
    """One mean over all atoms: a batch of 1 and of 3 atoms is no mean of means."""
    label = torch.tensor([[4.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    free = torch.ones(4, dtype=torch.bool)
    assert forces_loss(torch.zeros(4, 3), label, free).item() == pytest.approx((4 + 1 + 1 + 1) / 4)


def test_base_loss_weighs_terms_and_gives_parts_unweighted():
    total, parts = base_loss(outputs(), targets(), energy_weight=1.0, forces_weight=100.0)
    assert total.item() == pytest.approx(1.75 + 100 * 4.0)
    assert {k: v.item() for k, v in parts.items()} == pytest.approx({"energy": 1.75, "forces": 4.0})


@pytest.mark.parametrize(
    ("energy", "forces", "expected"),
    [
        (ENERGY_LABEL, torch.full((5, 3), NAN), 1.75),
        (torch.full((3,), NAN), FORCES_LABEL, 400.0),
        (torch.full((3,), NAN), torch.full((5, 3), NAN), 0.0),
    ],
    ids=["only energy", "only forces", "no label"],
)
def test_missing_labels_leave_no_trace(energy, forces, expected):
    predicted = outputs(ENERGY.clone().requires_grad_(), torch.zeros(5, 3, requires_grad=True))
    total, _ = base_loss(predicted, targets(energy=energy, forces=forces), 1.0, 100.0)
    total.backward()
    assert total.item() == pytest.approx(expected)
    missing_energy, missing_forces = energy.isnan(), forces.isnan().any(dim=1) | ~FREE
    assert (predicted["energy"].grad[missing_energy] == 0).all()
    assert (predicted["forces"].grad[missing_forces] == 0).all()
    assert predicted["energy"].grad.isfinite().all()
    assert predicted["forces"].grad.isfinite().all()


def test_gradients_are_signs_and_unit_vectors_over_the_counts():
    energy, forces = ENERGY.clone().requires_grad_(), torch.zeros(5, 3, requires_grad=True)
    base_loss(outputs(energy, forces), targets(), 1.0, 100.0).total.backward()
    assert energy.grad.tolist() == pytest.approx([0.5, 0, -0.5])
    expected = torch.zeros(5, 3)
    expected[0] = -100 * FORCES_LABEL[0] / 5 / 2
    expected[3] = -100 * FORCES_LABEL[3] / 3 / 2
    torch.testing.assert_close(forces.grad, expected)


def test_a_perfect_force_has_a_finite_gradient():
    forces = FORCES_LABEL[:2].clone().requires_grad_()
    loss = forces_loss(forces, FORCES_LABEL[:2], torch.tensor([True, True]))
    loss.backward()
    assert loss.item() < 1e-11
    assert (forces.grad == 0).all()


def test_a_batch_of_fixed_atoms_costs_nothing():
    forces = torch.zeros(5, 3, requires_grad=True)
    loss = forces_loss(forces, FORCES_LABEL, torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (forces.grad == 0).all()


@pytest.mark.parametrize(("kind", "expected"), [("mse", (1 + 4 + 9 + 16) / 4), ("mae", 10 / 4)])
def test_n2n_is_one_mean_over_atoms_and_channels(kind, expected):
    mapped = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert feature_loss(mapped, torch.zeros(2, 2), kind).item() == expected


def test_huber_is_half_the_square_and_from_delta_on_grows_evenly():
    """Errors 0.3, -1, 1.5 and 0; delta 1: 0.045, 0.5, 1, 0; delta 0.5: 0.045, 0.375, 0.625, 0."""
    mapped, target = torch.tensor([[0.3, -1.0], [2.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.5, 4.0]])
    assert feature_loss(mapped, target, "huber").item() == pytest.approx(1.545 / 4)
    assert feature_loss(mapped, target, "huber", delta=0.5).item() == pytest.approx(1.045 / 4)
    wide = feature_loss(mapped, target, "huber", delta=100.0).item()
    assert wide == pytest.approx(feature_loss(mapped, target, "mse").item() / 2)
    weights = torch.tensor([2.0, 0.0])
    assert feature_loss(mapped, target, "huber", weights).item() == pytest.approx(2 * 0.545 / 4)


def test_v2v_is_one_mean_over_atoms_components_and_channels():
    mapped = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [0.0, 1.0]]])  # (1, 3, 2)
    assert feature_loss(mapped, torch.zeros(1, 3, 2), "mse").item() == pytest.approx(6 / 6)
    assert feature_loss(mapped, torch.zeros(1, 3, 2), "mae").item() == pytest.approx(4 / 6)


def test_a_batch_without_edges_costs_nothing():
    mapped = torch.zeros(0, 4, requires_grad=True)
    loss = feature_loss(mapped, torch.zeros(0, 4), "mse")
    loss.backward()
    assert loss.item() == 0


def test_features_of_half_precision_are_compared_in_float32():
    mapped = torch.full((2, 3), 300.0, dtype=torch.float16)  # 90,000 overflows float16
    assert feature_loss(mapped, torch.zeros(2, 3), "mse").item() == 90_000


def test_vanilla1_is_the_training_loss_against_the_teacher():
    """The teacher knows every atom; only free ones count, labels do not matter."""
    teacher = {
        "energy": torch.tensor([1.0, 4.0, 0.0]),  # errors 0, 1, 2
        "forces": torch.tensor(
            [[0.0, 0, 2], [7, 7, 7], [0, 6, 8], [0, 0, 0], [0, 4, 0]]
        ),  # free: 2, 10, 0, 4
    }
    loss = vanilla1_loss(outputs(), targets(teacher=teacher), 1.0, 100.0)
    assert loss.item() == pytest.approx(3 / 3 + 100 * 16 / 4)


def test_vanilla2_is_the_mean_over_all_atoms_fixed_ones_included():
    teacher = {"atomic_energies": torch.tensor([0.0, 1.0, 0.0, 0.0, -3.0])}
    student = outputs(atomic_energies=torch.tensor([1.0, 3.0, 0.0, 0.0, -1.0]))
    assert vanilla2_loss(student, targets(teacher=teacher)).item() == pytest.approx((1 + 2 + 2) / 5)


def test_pseudo_labels_fill_only_what_is_missing():
    teacher = {"energy": torch.tensor([7.0, 8.0, 9.0]), "forces": torch.full((5, 3), 0.5)}
    filled = fill_labels(targets(teacher=teacher))
    assert filled.energy.tolist() == [0.5, 8.0, 1.0]
    known = FORCES_LABEL.isfinite()
    assert torch.equal(filled.forces[known], FORCES_LABEL[known])
    assert (filled.forces[~known] == 0.5).all()
    assert filled.free is FREE


def test_terms_combine_with_their_own_weight_and_are_logged_without():
    """Eq. 2 with four terms, identity heads: every number can be followed by hand."""
    terms = (
        KDTerm(name="n2n", head="identity"),
        KDTerm(name="v2v", head="identity", loss="mae"),
        KDTerm(name="vanilla1"),
        KDTerm(name="vanilla2"),
    )
    weights = dict(zip((term.label for term in terms), (10.0, 0.5, 2.0, 200.0), strict=True))
    specs = {"node": node_spec(2), "v2v": v2v_spec(1)}
    teacher_specs = specs | {name: node_spec(1, name) for name in ("energy", "forces", "atomic_energies")}
    teacher = {
        "node": torch.zeros(5, 2),
        "v2v": torch.zeros(5, 3, 1),
        "energy": ENERGY + 1,
        "forces": torch.zeros(5, 3),
        "atomic_energies": torch.zeros(5),
    }
    student = outputs(
        node=torch.full((5, 2), 3.0), v2v=torch.full((5, 3, 1), -2.0), atomic_energies=torch.full((5,), 0.25)
    )
    objective = Objective(terms, weights, make_heads(terms, specs, teacher_specs), 1.0, 100.0)
    total, parts = objective(student, targets(teacher=teacher))
    expected = {
        "energy": 1.75,
        "forces": 4.0,
        "n2n,head=identity": 9.0,
        "v2v,head=identity,loss=mae": 2.0,
        "vanilla1": 1.0,
        "vanilla2": 0.25,
    }
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(expected)
    assert total.item() == pytest.approx(401.75 + 10 * 9 + 0.5 * 2 + 2 * 1 + 200 * 0.25)


def test_layers_stand_behind_each_other_in_the_order_they_are_given():
    """Identity heads and taps: 1, 2 of the student against 1, 5 of the teacher, then 2, 1."""
    terms = tuple(
        KDTerm(name="n2n", head="identity", teacher_tap="H3", student_taps=taps)
        for taps in (("U1", "U2"), ("U2", "U1"))
    )
    layers = {f"layer/U{k}": torch.full((5, 1), float(k)) for k in (1, 2)}
    specs = {name: node_spec(1, name) for name in layers}
    weights = {term.label: 1.0 for term in terms}
    objective = Objective(terms, weights, make_heads(terms, specs, {"layer/H3": node_spec(2)}), 1.0, 1.0)
    teacher = {"layer/H3": torch.tensor([[1.0, 5.0]]).expand(5, 2)}
    _, parts = objective(outputs(**layers), targets(teacher=teacher))
    assert parts["n2n:H3->U1+U2,head=identity"].item() == pytest.approx((0 + 9) / 2)
    assert parts["n2n:H3->U2+U1,head=identity"].item() == pytest.approx((1 + 16) / 2)


def test_edges_are_compared_one_by_one():
    terms = (KDTerm(name="e2e", head="identity"),)
    heads = make_heads(terms, {"edge": edge_spec(2)}, {"edge": edge_spec(2)})
    objective = Objective(terms, {terms[0].label: 1.0}, heads, 1.0, 1.0)
    student = outputs(edge=torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]))
    teacher = {"edge": torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.0, 1.0]])}
    loss = objective(student, targets(teacher=teacher)).parts[terms[0].label]
    assert loss.item() == pytest.approx((4 + 9 + 1) / 6)
