"""Projected gradient ascent: it climbs, and stays within its bounds."""

import numpy as np
import pytest
import torch
from augment_cases import ethanol, looking, system

from molkd.pipeline.augment.adversarial import ascend, project
from molkd.pipeline.augment.rattle import rattled
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.config.augment import AdversarialConfig
from molkd.pipeline.models.potential import Potential


def settings(tmp_path, **given):
    cache = CacheConfig(store=tmp_path / "out.kdcache", teacher="none")
    return AdversarialConfig(cache=cache, data=tmp_path, student="none", **given)


def test_projection_by_hand():
    center = np.zeros((3, 3))
    positions = np.array([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(project(center, positions, 0.5), [[0.3, 0.4, 0], [0.1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["energy", "forces"])
@pytest.mark.parametrize("teacher", ["direct.safetensors", "ethanol.npz"])
def test_the_discrepancy_rises_within_the_bound(files, tmp_path, teacher, weights):
    student = Potential.load(files / "smooth.safetensors").to("cpu", torch.float64)
    student.model.requires_grad_(False)
    config = settings(
        tmp_path, steps=8, step_size=0.02, max_displacement=0.08, jitter=0.02,
        energy_weight=weights[0], forces_weight=weights[1],
    )  # fmt: skip
    parents = [system(ethanol(k), fixed=(0, 1)) for k in range(4)]
    first = [rattled(p, 0.02, np.random.default_rng(k)) for k, p in enumerate(parents)]
    look = looking(files / teacher)
    climb = ascend(student, look, parents, first, config)
    assert (climb.values[-1] > climb.values[0]).all()
    rises = np.diff(climb.values[:4], axis=0) > 0  # before the bound, the last steps go along it
    assert rises.mean() > 0.9
    for positions in climb.positions:
        for parent, x in zip(parents, positions, strict=True):
            assert np.linalg.norm(x - parent.positions, axis=1).max() <= 0.08 + 1e-7
            assert (x[:2] == parent.positions[:2]).all()
    random = [
        [rattled(p, 0.05, np.random.default_rng([k, j])) for j in range(10)] for k, p in enumerate(parents)
    ]
    for k, parent in enumerate(parents):  # random displacements within the bound are no match
        tried = [project(parent.positions, x, 0.08) for x in random[k]]
        still = settings(
            tmp_path, steps=1, max_displacement=0.08, energy_weight=weights[0], forces_weight=weights[1]
        )
        by_chance = ascend(student, looking(files / teacher), [parent] * 10, tried, still).values[0]
        assert climb.values[:, k].max() > np.median(by_chance)
