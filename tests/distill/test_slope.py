"""The term `grad` and `training.gradient_weight`: the slope of the student's energy against forces."""

import pytest
import torch
from distill_cases import GEMNET, MODELS, column, read_summary, train_config

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm
from molkd.pipeline.distill.heads import make_heads
from molkd.pipeline.distill.losses import Targets, gradient_loss
from molkd.pipeline.distill.objective import Objective
from molkd.pipeline.distill.step import first_samples, forward, initial_state
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.graphs.batch import to_device

CPU = torch.device("cpu")
STEP = 1e-4  # A, of the central differences
NAN = float("nan")


def hand_targets(**changes):
    forces = torch.tensor([[-1.0, 0, 0], [0, 0, 4.0], [NAN, 0, 0], [5.0, 5, 5]])
    values = {
        "energy": torch.tensor([0.0]),
        "forces": forces,
        "free": torch.tensor([True, True, True, False]),
        "teacher": {"forces": torch.zeros(4, 3)},
    }
    return Targets(**(values | changes))


HAND_OUTPUTS = {
    "energy": torch.tensor([2.0]),
    "forces": torch.zeros(4, 3),
    "energy_gradient": torch.tensor([[1.0, 0, 0], [0, 3.0, 0], [7.0, 0, 0], [9.0, 9, 9]]),
}


def test_loss_is_the_mean_length_of_force_plus_gradient_over_free_labelled_atoms():
    """Atom 0 fits, atom 1 is off by (0, 3, 4), atom 2 has no label, atom 3 is fixed."""
    targets = hand_targets()
    assert gradient_loss(HAND_OUTPUTS, targets.forces, targets).item() == pytest.approx((0 + 5) / 2)


def test_objective_adds_the_slope_against_labels_and_against_the_teacher_each_with_its_weight():
    """Energy 1 x 2, forces 10 x (1 + 4) / 2, labels' slope 3 x 2.5, teacher's slope 0.5 x (1 + 3 + 7) / 3."""
    term = KDTerm(name="grad", weight=0.5)
    objective = Objective((term,), {"grad": 0.5}, make_heads((), {}, {}), 1.0, 10.0, gradient_weight=3.0)
    total, parts = objective(HAND_OUTPUTS, hand_targets())
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(
        {"energy": 2.0, "forces": 2.5, "gradient": 2.5, "grad": 11 / 3}
    )
    assert total.item() == pytest.approx(2 + 10 * 2.5 + 3 * 2.5 + 0.5 * 11 / 3)
    assert objective.part_names == tuple(parts)


# Every atom with every other in every graph: an energy jumps where a neighbor drops out of one.
STUDENTS = MODELS | {"gemnet": GEMNET | dict.fromkeys(("max_neighbors", "max_neighbors_qint"), 50)}


@pytest.mark.parametrize("model", STUDENTS)
def test_gradient_of_the_step_is_that_of_the_energy(store, tmp_path, model):
    """Against central differences in float64, for direct forces and for forces that are gradients."""
    config = train_config(store, tmp_path, model=STUDENTS[model], kd=[{"name": "grad"}])
    cache = Cache.open(store)
    state = initial_state(cache, prepare(cache, config, CPU), config, CPU)
    state.potential.model.double()
    with first_samples(state.loader, 1) as samples:
        batch = to_device(next(samples).batch, CPU, torch.float64)
    gradient = forward(state, batch, config)["energy_gradient"]
    for atom, axis in [(0, 0), (4, 1), (batch.n_atoms - 1, 2)]:
        shift = torch.zeros_like(batch.positions)
        shift[atom, axis] = STEP
        with torch.no_grad():
            up, down = (
                state.potential.model(batch._replace(positions=batch.positions + sign * shift))[
                    "energy"
                ].sum()
                for sign in (1, -1)
            )
        assert gradient[atom, axis].item() == pytest.approx(
            ((up - down) / (2 * STEP)).item(), rel=1e-5, abs=1e-7
        )


@pytest.mark.parametrize(("setting", "name"), [("kd", "grad"), ("labels", "gradient")])
def test_training_on_the_slope_brings_the_energy_in_line_with_forces(store, tmp_path, setting, name):
    """Nothing else is trained: the weights of energies and forces are zero."""
    changes = {"kd": [{"name": "grad", "weight": 1.0}]} if setting == "kd" else {}
    training = {"energy_weight": 0.0, "forces_weight": 0.0, "max_steps": 60, "lr": 1e-2}
    training |= {} if setting == "kd" else {"gradient_weight": 1.0}
    train_student(train_config(store, tmp_path / "run", training=training, **changes))
    losses = column(tmp_path / "run", f"train_{name}")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert read_summary(tmp_path / "run")["kd"] == ({"grad": 1.0} if setting == "kd" else {})
