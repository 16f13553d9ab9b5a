"""Crystals and slabs against ASE's own and against OC20's conventions."""

import ase.io
import numpy as np
import pytest
from ase.build import bulk, fcc111
from ase.neighborlist import neighbor_list
from augment_cases import METALS

from molkd.pipeline.augment.slabs import named_bulk, parse_facet, read_bulks, slab
from molkd.pipeline.errors import ConfigError

OC20 = {"min_lateral": 8.0, "min_thickness": 7.0, "vacuum": 20.0, "free_depth": 3.0}


def nearest(atoms):
    """Return the distance of nearest neighbours and how many of each element an atom has, by element."""
    shells = neighbor_list("ijd", atoms, 4.0)
    shortest = shells[2].min()
    close = shells[2] < shortest + 0.01
    counts = {}
    for i, j in zip(shells[0][close], shells[1][close], strict=True):
        counts.setdefault(atoms.symbols[i], []).append(atoms.symbols[j])
    n = {s: (atoms.symbols == s).sum() for s in counts}
    return shortest, {s: {t: c.count(t) / n[s] for t in set(c)} for s, c in counts.items()}


def test_alloys_have_their_neighbours():
    copper, gold = 3.61 / 2**0.5, 4.08 / 2**0.5
    distance, around = nearest(named_bulk("Cu3Au").atoms)
    assert distance == pytest.approx((3 * copper + gold) / 4, rel=1e-3)
    assert around == {"Au": {"Cu": 12}, "Cu": {"Au": 4, "Cu": 8}}  # L1_2
    distance, around = nearest(named_bulk("CuZn").atoms)
    assert distance == pytest.approx((copper + 2.66) / 2, rel=1e-3)
    assert around == {"Cu": {"Zn": 8}, "Zn": {"Cu": 8}}  # B2


def test_a_copper_slab_as_in_oc20():
    made = slab(named_bulk("Cu"), (1, 1, 1), **OC20)
    ase = fcc111(
        "Cu", (4, 4, 4), vacuum=10.0
    )  # 4 layers of 2.08 A are the first 7 A; 4 cells of 2.21 A the first 8 A
    assert len(made) == len(ase)
    np.testing.assert_allclose(np.sort(made.positions[:, 2]), np.sort(ase.positions[:, 2]), atol=1e-6)
    assert np.linalg.norm(np.cross(*made.cell[:2])) == pytest.approx(np.linalg.norm(np.cross(*ase.cell[:2])))
    assert made.cell[2].tolist() == pytest.approx([0, 0, np.ptp(made.positions[:, 2]) + 20])
    assert made.pbc.all()
    layers = np.unique(np.round(made.positions[:, 2], 3))
    in_top = np.isin(np.round(made.positions[:, 2], 3), layers[-2:])  # 3 A hold two layers
    assert (made.get_tags() == in_top).all()
    assert sorted(made.constraints[0].index) == np.flatnonzero(~in_top).tolist()
    shortest, around = nearest(made)
    assert shortest == pytest.approx(3.61 / 2**0.5)
    assert around["Cu"]["Cu"] == pytest.approx((12 + 12 + 9 + 9) / 4)


@pytest.mark.parametrize("facet", [(1, 0, 0), (1, 1, 0), (2, 1, 1), (1, 0, -1)])
def test_every_facet_is_wide_enough(facet):
    made = slab(named_bulk("Fe"), facet, **OC20)
    a, b = made.cell[0], made.cell[1]
    area = np.linalg.norm(np.cross(a, b))
    assert min(area / np.linalg.norm(a), area / np.linalg.norm(b)) >= 8.0
    assert area * (np.ptp(made.positions[:, 2])) > 0
    assert nearest(made)[0] == pytest.approx(2.87 * 0.75**0.5)
    assert set(made.get_tags()) == {0, 1}


def test_crystals_from_a_file(tmp_path):
    ase.io.write(tmp_path / "bulks.extxyz", [bulk("Au", cubic=True), bulk("Cu", cubic=True)])
    bulks = read_bulks([str(tmp_path / "bulks.extxyz")], METALS)
    assert [(b.name, set(b.atoms.symbols)) for b in bulks] == [
        ("bulks.extxyz#0", {"Au"}),
        ("bulks.extxyz#1", {"Cu"}),
    ]
    assert [b.name for b in read_bulks((), METALS)] == ["Cu", "Au"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["Pt"], "Pt.*does not know"),
        (["Cu3Pt"], "Pt.*does not know"),
        (["Cu2Au"], "no element.*A3B"),
        (["Unobtainium"], "no element"),
        (["S"], "no simple lattice"),
    ],
)
def test_crystals_that_cannot_be_had(names, says):
    with pytest.raises(ConfigError, match=says):
        read_bulks(names, METALS)


def test_facets_are_read():
    assert parse_facet("111") == (1, 1, 1)
    assert parse_facet("1,0,-1") == (1, 0, -1)
    for text in ("11", "000", "1,2", "1,a,0", "1110"):
        with pytest.raises(ConfigError, match="three Miller indices"):
            parse_facet(text)
