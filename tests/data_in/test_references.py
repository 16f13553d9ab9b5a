"""Energy references and label scale against hand-worked values and invariants."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molkd.pipeline.data import references as module
from molkd.pipeline.data.references import (
    LabelScale,
    count_elements,
    fit_label_scale,
    fit_references,
    sum_references,
)
from molkd.pipeline.errors import DataError


def counts_of(*compositions):
    counts = np.zeros((len(compositions), 119), dtype=np.int64)
    for row, composition in zip(counts, compositions, strict=True):
        for z, n in composition.items():
            row[z] = n
    return counts


WATER, METHANE, METHANOL, HYDROGEN = {8: 1, 1: 2}, {6: 1, 1: 4}, {6: 1, 8: 1, 1: 4}, {1: 2}


def test_count_elements():
    counts = count_elements(np.array([8, 1, 1, 6, 8], np.uint8), np.array([3, 0, 2]))
    np.testing.assert_array_equal(counts, counts_of(WATER, {}, {6: 1, 8: 1}))


def test_exact_where_compositions_tell_elements_apart(caplog):
    energies = [-400.0 - 26.0, -1000.0 - 52.0, np.nan, -26.0]
    fitted = fit_references(counts_of(WATER, METHANE, METHANOL, HYDROGEN), energies)
    assert fitted == {1: pytest.approx(-13.0), 6: pytest.approx(-1000.0), 8: pytest.approx(-400.0)}
    assert not caplog.records


def test_one_composition_gives_the_mean_per_atom(caplog):
    counts = counts_of(WATER, WATER)
    fitted = fit_references(counts, [-30.0, -30.6])
    assert sum_references(counts, fitted) == pytest.approx([-30.3, -30.3])
    assert fitted == {1: pytest.approx(-10.1), 8: pytest.approx(-10.1)}
    assert "tell only 1 of 2 elements apart" in caplog.text


def test_one_composition_many_times_stays_rank_one():
    """Rounding in the QR factor must not count as a second composition."""
    counts = counts_of(*[{1: 6, 6: 2, 8: 1}] * 900)
    energies = -4209.0 + np.random.default_rng(0).normal(scale=0.2, size=900)
    fitted = fit_references(counts, energies)
    assert list(fitted.values()) == [pytest.approx(energies.mean() / 9)] * 3


def test_blocks_give_the_same_as_one_lstsq(monkeypatch):
    rng = np.random.default_rng(0)
    counts = np.zeros((500, 119), dtype=np.int64)
    elements = [1, 6, 7, 8, 29, 78]
    counts[:, elements] = rng.integers(0, 30, (500, 6))
    energies = counts[:, elements] @ rng.uniform(-3000, -10, 6) + rng.normal(size=500)
    expected = np.linalg.lstsq(counts[:, elements].astype(float), energies, rcond=None)[0]
    monkeypatch.setattr(module, "_ROWS_PER_BLOCK", 64)
    fitted = fit_references(counts, energies)
    np.testing.assert_allclose([fitted[z] for z in elements], expected, rtol=1e-11)


def test_no_energy_at_all():
    with pytest.raises(DataError, match="no system has an energy"):
        fit_references(counts_of(WATER), [np.nan])


def test_missing_reference_names_the_element():
    with pytest.raises(DataError, match=r"no energy reference for O; there are references for H, C"):
        sum_references(counts_of(WATER), {1: -1.0, 6: -2.0})


ENERGIES = st.floats(-1e6, 1e6)


@given(
    energies=st.lists(ENERGIES, min_size=2, max_size=2),
    mean=ENERGIES,
    std=st.floats(1e-3, 1e3),
    forces_std=st.floats(1e-3, 1e3),
    references=st.dictionaries(st.sampled_from([1, 8]), ENERGIES, min_size=2),
)
def test_scale_is_undone(energies, mean, std, forces_std, references):
    scale = LabelScale(mean, std, forces_std, references)
    counts = counts_of(WATER, HYDROGEN)
    normalized = scale.normalize_energy(np.array(energies), counts)
    largest = max(map(abs, [*energies, mean, *references.values(), 1.0]))
    np.testing.assert_allclose(
        scale.restore_energy(normalized, counts), energies, rtol=0, atol=1e-14 * 8 * largest
    )
    forces = np.array([energies, energies])
    np.testing.assert_allclose(
        scale.restore_forces(scale.normalize_forces(forces)), forces, rtol=1e-15, atol=1e-300
    )
    assert LabelScale.from_dict(json.loads(json.dumps(scale.to_dict()))) == scale


def test_scale_by_energies_as_in_oc20():
    counts = counts_of(*[WATER] * 4)
    energies = np.array([1.0, 3.0, np.nan, 5.0])
    scale = fit_label_scale(counts, energies, 7.0, "energy")
    assert (scale.energy_mean, scale.energy_std) == (3.0, pytest.approx(np.sqrt(8 / 3)))
    assert scale.forces_std == scale.energy_std
    normalized = scale.normalize_energy(energies, counts)
    assert np.nanmean(normalized) == pytest.approx(0, abs=1e-15)
    assert np.nanstd(normalized) == pytest.approx(1)
    assert np.isnan(normalized[2])


def test_scale_with_references():
    counts = counts_of(WATER, HYDROGEN)
    scale = fit_label_scale(counts, [-21.0, -13.0], 0.5, "forces", {1: -5.0, 8: -10.0})
    assert scale == LabelScale(-2.0, 0.5, 0.5, {1: -5.0, 8: -10.0})
    assert scale.normalize_energy(np.array([-21.0, -13.0]), counts).tolist() == [2.0, -2.0]


def test_fitted_references_and_no_scale():
    counts = counts_of(WATER, HYDROGEN, WATER)
    scale = fit_label_scale(counts, [-36.0, -26.0, np.nan], np.nan, "none", "fit")
    assert (scale.energy_mean, scale.energy_std, scale.forces_std) == (0.0, 1.0, 1.0)
    assert scale.references == {1: pytest.approx(-13.0), 8: pytest.approx(-10.0)}


def test_scale_by_forces_without_energies():
    scale = fit_label_scale(counts_of(WATER), [np.nan], 0.5, "forces", "fit")
    assert scale == LabelScale(0.0, 0.5, 0.5, {})


@pytest.mark.parametrize(
    ("energies", "force_rms", "mode", "message"),
    [
        ([np.nan, np.nan], 1.0, "energy", "no system has one"),
        ([2.0, 2.0], 1.0, "energy", "vary by"),
        ([2.0, 3.0], np.nan, "forces", "force labels are missing or all zero"),
        ([2.0, 3.0], 0.0, "forces", "force labels are missing or all zero"),
    ],
)
def test_labels_that_give_no_scale(energies, force_rms, mode, message):
    with pytest.raises(DataError, match=message):
        fit_label_scale(counts_of(WATER, WATER), energies, force_rms, mode)


@pytest.mark.parametrize(
    "values", [(np.nan, 1.0, 1.0), (0.0, 0.0, 1.0), (0.0, 1.0, -1.0), (0.0, 1.0, 1.0, {1: np.inf})]
)
def test_impossible_scale(values):
    with pytest.raises(DataError, match="label scale"):
        LabelScale(*values)
