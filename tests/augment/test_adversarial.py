"""Projected gradient ascent: it climbs, and stays within its bounds."""

from collections import Counter

import numpy as np
import pytest
import torch
from augment_cases import ethanol, looking, system

import molkd.pipeline.augment.adversarial as module
from molkd.pipeline.augment.adversarial import NOT_COMPARED, Adversarial, ascend, project
from molkd.pipeline.augment.discrepancy import measure
from molkd.pipeline.augment.rattle import rattled
from molkd.pipeline.augment.starts import draw_parents
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.config.augment import AdversarialConfig
from molkd.pipeline.errors import TeacherError
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


def adversarial(files, tmp_path, **given):
    student = Potential.load(files / "smooth.safetensors").to("cpu", torch.float64)
    student.model.requires_grad_(False)
    config = settings(tmp_path, steps=2, **given)
    with draw_parents(files / "molecules.extxyz", None, 0, ()) as parents:
        yield Adversarial(config, parents, student, looking(files / "direct.safetensors"))


def test_ascents_that_need_too_much_memory_are_done_in_smaller_groups(files, tmp_path, monkeypatch):
    def limited(student, looking, systems, *weights):
        if len(systems) > 2:
            raise torch.OutOfMemoryError
        return measure(student, looking, systems, *weights)

    for method in adversarial(files, tmp_path):
        whole = method.make(range(5), Counter())
        monkeypatch.setattr(module, "measure", limited)
        parts = method.make(range(5), Counter())
        assert [f.made["start"] for f in parts] == list(range(5))
        for one, other in zip(whole, parts, strict=True):
            np.testing.assert_allclose(one.system.positions, other.system.positions, atol=1e-7)
        monkeypatch.setattr(module, "measure", lambda *_: limited(None, None, range(3)))
        with pytest.raises(TeacherError, match=r"molecules.extxyz#\d.*--device cpu"):
            method.make([0], Counter())


def test_what_cannot_be_compared_is_dropped(files, tmp_path, monkeypatch):
    def broken(student, looking, systems, *weights):
        found = measure(student, looking, systems, *weights)
        found.values[1] = np.nan
        return found

    monkeypatch.setattr(module, "measure", broken)
    for method in adversarial(files, tmp_path):
        dropped = Counter()
        assert [f.made["start"] for f in method.make(range(3), dropped)] == [0, 2]
        assert dropped == {NOT_COMPARED: 1}
