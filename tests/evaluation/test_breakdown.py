"""Errors by element, tag, size, formula, file and word against numpy over all predictions at once."""

from dataclasses import replace

import numpy as np
import pytest
from made_systems import collected, made_predictions, made_systems

from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation import breakdown
from molkd.pipeline.evaluation.breakdown import KINDS, OTHERS, GroupSums, check_kind, formula
from molkd.pipeline.evaluation.collect import Collector
from molkd.pipeline.evaluation.metrics import TERMS, MetricSums, system_terms

SUM_TOLERANCE = 1e-12  # relative; the same float64 numbers summed in another order
SYSTEMS = made_systems()
INFO_KIND = "info:adsorbate"


def _of_atoms():
    """Return per atom: element, tag, counts, |dF| components; everything at once, by plain numpy."""
    _, forces = made_predictions(SYSTEMS)
    labels = np.concatenate([s.forces for s in SYSTEMS])
    counts = ~np.concatenate([s.fixed for s in SYSTEMS]) & np.isfinite(labels).all(axis=1)
    numbers = np.concatenate([s.atomic_numbers for s in SYSTEMS])
    return numbers, np.concatenate([s.tags for s in SYSTEMS]), counts, np.abs(forces - labels)


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_forces_by_element_and_tag(batch_size):
    found = collected(Collector(0, KINDS), SYSTEMS, batch_size).breakdowns
    numbers, tags, counts, errors = _of_atoms()
    assert found["element"].keys == ("H", "C", "O", "Mo")
    for z, metrics in zip((1, 6, 8, 42), found["element"].metrics().values(), strict=True):
        mine = counts & (numbers == z)
        assert metrics.n_force_atoms == mine.sum()
        assert metrics.force_mae == pytest.approx(errors[mine].mean(), rel=SUM_TOLERANCE)
        assert metrics.n_energies == 0
    assert found["tag"].keys == ("adsorbate (2)", "sub-surface (0)", "surface (1)")
    surface = counts & (tags == 1)
    assert found["tag"].metrics()["surface (1)"].force_mae == pytest.approx(errors[surface].mean())


@pytest.mark.parametrize(
    ("kind", "key_of"),
    [
        ("size", lambda s: str(s.n_atoms)),
        ("source", lambda s: s.source[:8]),
        (INFO_KIND, lambda s: s.info.get("adsorbate", "(none)")),
        ("formula", lambda s: tuple(np.sort(s.atomic_numbers))),
    ],
)
def test_energies_and_forces_by_group_of_systems(kind, key_of):
    result = collected(Collector(0, [kind]), SYSTEMS, 8).breakdowns[kind]
    energy, forces = made_predictions(SYSTEMS)
    split = np.split(forces, np.cumsum([s.n_atoms for s in SYSTEMS])[:-1])
    keys = [key_of(s) for s in SYSTEMS]
    assert len(result.keys) == len(set(keys))
    for key in set(keys):
        members = [i for i, k in enumerate(keys) if k == key]
        name = formula(SYSTEMS[members[0]]) if kind == "formula" else key
        metrics = result.metrics()[name]
        of_energy = [abs(energy[i] - SYSTEMS[i].energy) for i in members if np.isfinite(SYSTEMS[i].energy)]
        assert metrics.n_systems == len(members)
        assert metrics.n_energies == len(of_energy)
        if of_energy:
            assert metrics.energy_mae == pytest.approx(np.mean(of_energy), rel=SUM_TOLERANCE)
        of_forces = [np.abs(split[i] - SYSTEMS[i].forces)[~SYSTEMS[i].fixed].ravel() for i in members]
        of_forces = np.concatenate(of_forces)
        of_forces = of_forces[np.isfinite(of_forces)]
        if len(of_forces):
            assert metrics.force_mae == pytest.approx(of_forces.mean(), rel=SUM_TOLERANCE)


def test_groups_add_up_to_the_whole_and_do_not_depend_on_batches():
    results = [collected(Collector(0, [*KINDS, INFO_KIND]), SYSTEMS, n) for n in (1, 13, 60)]
    force_columns = [TERMS.index(t) for t in ("force_error", "force_cosine", "n_force_atoms")]
    for kind, found in results[0].breakdowns.items():
        columns = force_columns if found.of_atoms else slice(None)
        whole = np.array([vars(_all_sums())[name] for name in TERMS])[columns]
        np.testing.assert_allclose(found.terms.sum(axis=0)[columns], whole, rtol=SUM_TOLERANCE)
        for other in results[1:]:
            assert other.breakdowns[kind].keys == found.keys
            np.testing.assert_allclose(other.breakdowns[kind].terms, found.terms, rtol=SUM_TOLERANCE)


def _terms(systems):
    energy, forces = made_predictions(systems)
    return system_terms(
        energy_pred=energy,
        energy_label=np.array([s.energy for s in systems]),
        forces_pred=forces,
        forces_label=np.concatenate([s.forces for s in systems]),
        system_idx=np.repeat(np.arange(len(systems)), [s.n_atoms for s in systems]),
        fixed=np.concatenate([s.fixed for s in systems]),
    )


def _all_sums():
    sums = MetricSums()
    sums.add(_terms(SYSTEMS)[0])
    return sums


def test_workers_merge_to_the_same():
    of_systems, of_atoms = _terms(SYSTEMS)
    n_first = sum(s.n_atoms for s in SYSTEMS[:25])
    for kind in (*KINDS, INFO_KIND):
        whole, first, second = (GroupSums(kind) for _ in range(3))
        whole.update(SYSTEMS, of_systems, of_atoms)
        first.update(SYSTEMS[:25], of_systems[:25], of_atoms[:n_first])
        second.update(SYSTEMS[25:], of_systems[25:], of_atoms[n_first:])
        first.merge(second)
        assert first.result().keys == whole.result().keys
        np.testing.assert_allclose(first.result().terms, whole.result().terms, rtol=SUM_TOLERANCE)


def test_the_number_of_groups_is_bounded(monkeypatch):
    monkeypatch.setattr(breakdown, "MAX_KEYS", 5)
    found = collected(Collector(0, ["formula"]), SYSTEMS, 7).breakdowns["formula"]
    assert len(found.keys) == 6
    assert found.keys[-1] == OTHERS
    assert found.terms[:, TERMS.index("n_systems")].sum() == len(SYSTEMS)


def test_a_word_of_the_data_is_not_mistaken_for_what_is_left(monkeypatch):
    monkeypatch.setattr(breakdown, "MAX_KEYS", 1)
    systems = [replace(s, info={"adsorbate": OTHERS if i < 3 else str(i)}) for i, s in enumerate(SYSTEMS)]
    found = collected(Collector(0, [INFO_KIND]), systems, 7).breakdowns[INFO_KIND]
    counts = {key: metrics.n_systems for key, metrics in found.metrics().items()}
    assert counts == {f"'{OTHERS}'": 3, OTHERS: len(SYSTEMS) - 3}


def test_sizes_in_ranges():
    found = collected(Collector(0, ["size"]), SYSTEMS, 60).breakdowns["size"]
    assert found.keys == tuple(str(n) for n in range(1, 10))
    ranges = found.in_ranges(3)
    assert len(ranges.keys) == 3
    assert ranges.keys[0].startswith("1 to ")
    assert ranges.keys[-1].endswith(" to 9")
    np.testing.assert_allclose(ranges.terms.sum(axis=0), found.terms.sum(axis=0), rtol=SUM_TOLERANCE)
    counts = ranges.terms[:, TERMS.index("n_systems")]
    assert counts.min() >= 10  # of 60 in 3 ranges, where one size has up to 11
    assert found.in_ranges(9) is found


def test_tags_of_molecules_say_nothing():
    plain = [replace(s, tags=np.zeros(s.n_atoms, np.uint8)) for s in SYSTEMS]
    assert collected(Collector(0, ["tag"]), plain, 60).breakdowns["tag"].keys == ("no tags (0)",)


def test_formula_and_kinds():
    system = SYSTEMS[0]
    assert formula(replace(system, atomic_numbers=np.array([8, 1, 42, 6, 1], np.uint8))) == "CH2MoO"
    with pytest.raises(ConfigError, match="--by colour: take element, tag, size, formula, source or"):
        check_kind("colour")
    assert check_kind("info:T") == "info:T"
