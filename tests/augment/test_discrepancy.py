"""The discrepancy against its formula, its gradient against finite differences."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from augment_cases import ethanol, looking, system

from molkd.pipeline.augment.discrepancy import measure
from molkd.pipeline.models.potential import Potential

STEP = 3e-5  # A
TOLERANCE = 1e-5  # of the largest component; the error of central differences, summed over up to 27 of them
DIFFERENCES = 2e-3  # the derivative of this teacher's forces is a difference itself, over 0.01 A


def systems():
    cell = Atoms(
        "COHH", [[0, 0, 0], [1.3, 0.4, 0.2], [2.2, 2.4, 2.4], [3.0, 2.8, 2.6]], cell=[4.6, 4.4, 4.7], pbc=True
    )
    return [system(ethanol(1), fixed=(0, 5)), system(cell)]


def student_of(files, name):
    student = Potential.load(files / f"{name}.safetensors").to("cpu", torch.float64)
    student.model.requires_grad_(False)
    return student


def test_value_follows_the_formula(files):
    student, teacher = looking(files / "direct.safetensors"), looking(files / "smooth.safetensors")
    given = systems()
    expected = []
    for one, s, t in zip(given, student.look(given), teacher.look(given), strict=True):
        energy = (s.energy - t.energy) / one.n_atoms
        forces = (s.forces - t.forces)[~one.fixed]
        expected.append(2.0 * energy**2 + 3.0 * (forces**2).sum() / len(forces))
    found = measure(student_of(files, "direct"), teacher, given, 2.0, 3.0)
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 2.0)], ids=["energy", "forces", "both"])
@pytest.mark.parametrize(
    ("student", "teacher", "tolerance"),
    [
        ("direct", "smooth.safetensors", TOLERANCE),
        ("smooth", "direct.safetensors", TOLERANCE),
        ("smooth", "ethanol.npz", DIFFERENCES),  # no autograd through this one
    ],
)
def test_gradient_is_that_of_the_value(files, student, teacher, tolerance, weights):
    model, given = student_of(files, student), systems()[: 1 if teacher.endswith("npz") else 2]
    look = looking(files / teacher)
    gradient = measure(model, look, given, *weights).gradient
    random = np.random.default_rng(0)
    for _ in range(3):
        directions = [random.normal(size=s.positions.shape) for s in given]
        ahead, behind = (
            [replace(s, positions=s.positions + h * d) for s, d in zip(given, directions, strict=True)]
            for h in (STEP, -STEP)
        )
        change = measure(model, look, ahead, *weights).values - measure(model, look, behind, *weights).values
        expected = change / (2 * STEP)
        parts = np.split(gradient, [given[0].n_atoms])
        found = [(g * d).sum() for g, d in zip(parts, directions, strict=False)]
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(gradient).max())


def test_systems_of_a_batch_do_not_feel_each_other(files):
    model, look, given = student_of(files, "direct"), looking(files / "smooth.safetensors"), systems()
    together = measure(model, look, given, 1.0, 1.0)
    alone = [measure(model, look, [s], 1.0, 1.0) for s in given]
    np.testing.assert_allclose(together.values, np.concatenate([a.values for a in alone]), rtol=1e-9)
    np.testing.assert_allclose(
        together.gradient, np.concatenate([a.gradient for a in alone]), rtol=1e-7, atol=1e-9
    )
