"""Metrics against hand-worked values, masks, and independence of how a stream is cut."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molkd.pipeline.evaluation.metrics import Metrics, MetricSums

SUM_TOLERANCE = 1e-12  # relative; sums of a few hundred float64 numbers in another order
NAN = math.nan


def _update(sums, energy_pred, energy_label, forces_pred, forces_label, n_atoms, fixed=None):
    forces_label = np.array(forces_label, dtype=float).reshape(-1, 3)
    sums.update(
        energy_pred=np.array(energy_pred, dtype=float),
        energy_label=np.array(energy_label, dtype=float),
        forces_pred=np.array(forces_pred, dtype=float).reshape(-1, 3),
        forces_label=forces_label,
        system_idx=np.repeat(np.arange(len(n_atoms)), n_atoms),
        fixed=np.zeros(len(forces_label), bool) if fixed is None else np.array(fixed),
    )


def _result(*args, **kwargs) -> Metrics:
    sums = MetricSums()
    _update(sums, *args, **kwargs)
    return sums.result()


def test_hand_worked_two_systems():
    # System 1: one atom, dE = 0.3 eV; system 2: two atoms, dE = -0.1 eV.
    # Forces: (3,0,0) for (0,4,0): |dF| components 3,4,0, cosine 0, norms 3 and 4.
    #         (0,0,2) for (0,0,1): components 0,0,1, cosine 1, norms 2 and 1.
    #         (1,1,0) for (1,0,0): components 0,1,0, cosine 1/sqrt(2), norms sqrt(2) and 1.
    got = _result(
        [1.3, -5.1], [1.0, -5.0],
        [[3, 0, 0], [0, 0, 2], [1, 1, 0]],
        [[0, 4, 0], [0, 0, 1], [1, 0, 0]],
        [1, 2],
    )  # fmt: skip
    assert got.energy_mae == pytest.approx(0.2)
    assert got.energy_mae_per_atom == pytest.approx((0.3 + 0.05) / 2)
    assert got.force_mae == pytest.approx(9 / 9)
    assert got.force_rmse == pytest.approx(math.sqrt((9 + 16 + 1 + 1) / 9))
    assert got.force_cos == pytest.approx((0 + 1 + math.sqrt(0.5)) / 3)
    assert got.force_magnitude_error == pytest.approx((1 + 1 + math.sqrt(2) - 1) / 3)
    assert got.efwt == 0
    assert (got.n_systems, got.n_energies, got.n_force_atoms, got.n_efwt) == (2, 2, 3, 2)


def test_report_has_units_and_percent():
    report = _result([1.01], [1.0], [[0.02, 0, 0]], [[0.01, 0, 0]], [1]).to_report()
    assert report == pytest.approx(
        {"energy_mae_meV": 10, "force_mae_meV_A": 10 / 3, "force_cos": 1, "efwt_percent": 100}
    )


@pytest.mark.parametrize(
    ("energy_error", "force_error", "within"),
    [(0.0199, 0.0299, 1), (0.0201, 0.0, 0), (0.0, 0.0301, 0), (-0.0199, -0.0299, 1)],
)
def test_efwt_thresholds(energy_error, force_error, within):
    assert _result([energy_error], [0.0], [[0, force_error, 0]], [[0, 0, 0]], [1]).efwt == within


def test_efwt_threshold_itself_is_outside_as_in_oc20():
    assert _result([0.02], [0.0], [[0, 0, 0]], [[0, 0, 0]], [1]).efwt == 0
    assert _result([0.0], [0.0], [[0, 0.03, 0]], [[0, 0, 0]], [1]).efwt == 0


def test_fixed_atoms_do_not_count_anywhere():
    got = _result([0.0], [0.0], [[1, 0, 0], [9, 9, 9]], [[1, 0, 0], [0, 0, 0]], [2], fixed=[False, True])
    assert (got.force_mae, got.force_cos, got.efwt, got.n_force_atoms) == (0, 1, 1, 1)


def test_missing_labels_are_left_out_and_never_zero():
    # 1: energy only, 2: forces only, 3: one of two atoms labelled, 4: no label at all.
    forces_pred = np.ones((5, 3))
    forces_label = [[NAN] * 3, [1, 1, 3], [1, 1, 1], [1, NAN, 1], [NAN] * 3]
    got = _result([2.0, 7.0, 3.0, 7.0], [1.0, NAN, 3.0, NAN], forces_pred, forces_label, [1, 1, 2, 1])
    assert got.energy_mae == pytest.approx(0.5)
    assert got.force_mae == pytest.approx(2 / 6)
    assert (got.n_systems, got.n_energies, got.n_force_atoms, got.n_efwt) == (4, 2, 2, 0)
    assert got.to_report()["efwt_percent"] is None


def test_nothing_labelled_is_undefined():
    got = _result([1.0], [NAN], [[1, 1, 1]], [[NAN] * 3], [1])
    assert set(got.to_report().values()) == {None}
    assert math.isnan(got.energy_mae)


def test_system_without_free_atoms_has_an_energy_but_no_efwt():
    got = _result([1.0], [1.0], [[0, 0, 0]], [[0, 0, 0]], [1], fixed=[True])
    assert (got.n_energies, got.n_efwt, got.n_force_atoms) == (1, 0, 0)


def test_zero_forces_have_cosine_zero():
    got = _result([0.0], [0.0], [[0, 0, 0], [1, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 0], [0, 0, 0]], [3])
    assert got.force_cos == 0
    assert got.n_force_atoms == 3


def test_cosine_agrees_with_torch():
    rng = np.random.default_rng(0)
    pred, label = rng.normal(size=(50, 3)), rng.normal(size=(50, 3))
    pred[0], label[1] = 0.0, 0.0
    expected = torch.cosine_similarity(torch.from_numpy(pred), torch.from_numpy(label), dim=-1).mean().item()
    assert _result([0.0], [0.0], pred, label, [50]).force_cos == pytest.approx(expected, rel=SUM_TOLERANCE)


def test_diverged_prediction_is_seen():
    got = _result([NAN], [1.0], [[NAN] * 3], [[0, 0, 1]], [1])
    assert math.isnan(got.to_report()["force_mae_meV_A"])
    assert math.isnan(got.to_report()["energy_mae_meV"])
    assert got.efwt == 0


def test_float32_predictions_of_large_energies_are_summed_in_float64():
    n = 1000
    label = np.full(n, -1e5)
    got = _result(np.float32(label + 0.5), label, np.zeros((n, 3)), np.zeros((n, 3)), [1] * n)
    assert got.energy_mae == pytest.approx(0.5, rel=SUM_TOLERANCE)


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 20), max_size=6), seed=st.integers(0, 2**16), parts=st.integers(1, 3))
def test_any_split_and_any_number_of_workers_give_the_same(cuts, seed, parts):
    rng = np.random.default_rng(seed)
    n_atoms = rng.integers(1, 5, size=20)
    begin = np.concatenate([[0], np.cumsum(n_atoms)])
    energy = rng.normal(scale=0.02, size=(2, 20))
    energy[1, rng.random(20) < 0.2] = NAN
    forces = rng.normal(scale=0.02, size=(2, begin[-1], 3))
    forces[1, rng.random(begin[-1]) < 0.1] = NAN
    fixed = rng.random(begin[-1]) < 0.2
    whole = _result(*energy, *forces, n_atoms, fixed)

    workers = [MetricSums() for _ in range(parts)]
    edges = [0, *sorted(cuts), 20]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        atoms = slice(begin[a], begin[b])
        _update(workers[i % parts], *energy[:, a:b], *forces[:, atoms], n_atoms[a:b], fixed[atoms])
    for other in workers[1:]:
        workers[0].merge(other)
    for name, value in vars(workers[0].result()).items():
        assert value == pytest.approx(getattr(whole, name), rel=SUM_TOLERANCE, nan_ok=True), name
