"""Sites against those that ASE lists for its own slabs, and adsorbates set down on them."""

from collections import Counter

import numpy as np
import pytest
from ase import Atoms
from ase.build import bcc110, fcc100, fcc111, hcp0001, surface
from ase.data import covalent_radii
from augment_cases import METALS

from molkd.pipeline.augment.adsorbates import place, read_adsorbates
from molkd.pipeline.augment.sites import find_sites, lateral_vectors
from molkd.pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("slab", "per_atom"),
    [
        (fcc111("Cu", (2, 2, 4), vacuum=5), {"ontop": 1, "bridge": 3, "fcc": 1, "hcp": 1}),
        (hcp0001("Ru", (2, 2, 4), vacuum=5), {"ontop": 1, "bridge": 3, "fcc": 1, "hcp": 1}),
        (fcc100("Cu", (2, 2, 4), vacuum=5), {"ontop": 1, "bridge": 2, "hollow": 1}),
        (bcc110("Fe", (2, 2, 4), vacuum=5), {"ontop": 1, "bridge": 3, "hollow": 2}),
    ],
    ids=["fcc111", "hcp0001", "fcc100", "bcc110"],
)
def test_sites_are_where_ase_has_them(slab, per_atom):
    sites = find_sites(slab)
    assert Counter(s.kind for s in sites) == per_atom  # of the 2 x 2 atoms at the surface one stands for all
    known = slab.info["adsorbate_info"]
    cell = np.asarray(known["cell"])
    origin = slab.positions[slab.get_tags() == 1][0, :2]  # ASE counts layers from the top
    for name, where in known["sites"].items():
        kind = {"shortbridge": "bridge", "longbridge": None}.get(name, name)
        if kind is None or (kind == "hollow" and "shortbridge" in known["sites"]):
            continue  # bcc110's hollow: ASE takes it off the point that is equally far from three atoms
        away = [lateral_vectors(s.xy - origin - np.dot(where, cell), cell) for s in sites if s.kind == kind]
        assert min(np.linalg.norm(v) for v in away) < 1e-6, name


def test_sites_differ_where_atoms_do():
    """One of 2 x 2 copper atoms is gold: a shift of the slab onto itself is left only by whole cells."""
    slab = fcc111("Cu", (2, 2, 3), vacuum=5)
    slab.numbers[np.argmax(slab.positions[:, 2])] = 79
    assert Counter(s.kind for s in find_sites(slab)) == {"ontop": 4, "bridge": 12, "fcc": 4, "hcp": 4}


def test_an_alloy_repeats_by_its_own_cell():
    """Cu3Au(111): the cell holds four atoms of the surface, and stands here twice."""
    bulk = Atoms(
        "AuCu3", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], cell=[3.8] * 3
    )
    bulk.pbc = True
    slab = surface(bulk, (1, 1, 1), 3, vacuum=6, periodic=True)
    once, twice = (Counter(s.kind for s in find_sites(slab.repeat((n, 1, 1)))) for n in (1, 2))
    assert once == twice
    assert once["ontop"] == 4


@pytest.mark.parametrize(
    ("name", "binds", "n_atoms"),
    [
        ("CO", "C", 2),
        ("*OH", "O", 2),
        ("H2O", "O", 3),
        ("CH3OH:O", "O", 6),
        ("NNH", "N", 3),
        ("H", "H", 1),
        ("COOH", "C", 4),
    ],
)
def test_the_atom_that_binds_is_lowest(name, binds, n_atoms):
    ((_, atoms),) = read_adsorbates([name], METALS, named=True)
    assert len(atoms) == n_atoms
    lowest = int(np.argmin(np.abs(atoms.positions).sum(axis=1)))
    assert atoms.symbols[lowest] == binds
    assert atoms.positions[lowest].tolist() == [0, 0, 0]
    if n_atoms > 1:
        rest = np.delete(atoms.positions, lowest, axis=0).mean(axis=0)
        np.testing.assert_allclose(rest, [0, 0, np.linalg.norm(rest)], atol=1e-9)
    assert set(atoms.get_tags()) == {2}


@pytest.mark.parametrize("kind", ["ontop", "bridge", "fcc", "hcp"])
def test_an_adsorbate_touches_the_slab(kind):
    slab = fcc111("Cu", (3, 3, 3), vacuum=8)
    slab.pbc = True
    ((_, carbon_monoxide),) = read_adsorbates(["CO"], METALS, named=True)
    site = next(s for s in find_sites(slab) if s.kind == kind)
    together = place(slab, carbon_monoxide, site.xy, np.random.default_rng(3))
    n = len(slab)
    assert (together.positions[:n] == slab.positions).all()
    ratios = [
        together.get_distances(k, range(n), mic=True)
        / (covalent_radii[together.numbers[k]] + covalent_radii[29])
        for k in (n, n + 1)
    ]
    assert np.min(ratios) == pytest.approx(1.0, abs=1e-6)
    carbon, oxygen = (int(np.flatnonzero(together.numbers == z)[0]) for z in (6, 8))
    np.testing.assert_allclose(together.positions[carbon, :2], site.xy, atol=1e-9)
    assert together.get_distance(carbon, oxygen) == pytest.approx(carbon_monoxide.get_distance(0, 1))
    up = together.positions[oxygen] - together.positions[carbon]  # 20 degrees off the normal at most
    assert np.degrees(np.arccos(up[2] / np.linalg.norm(up))) <= 20.0 + 1e-6
    if kind == "ontop":  # 0.76 + 1.32 A above the atom
        assert together.positions[carbon, 2] - slab.positions[:, 2].max() == pytest.approx(2.08, abs=1e-6)


def test_adsorbates_that_cannot_be_had():
    with pytest.raises(ConfigError, match="S, which the teacher does not know"):
        read_adsorbates(["SH"], METALS, named=True)
    with pytest.raises(ConfigError, match="no molecule that ASE knows"):
        read_adsorbates(["Unobtainium"], METALS, named=True)
    with pytest.raises(ConfigError, match="no atom N"):
        read_adsorbates(["CO:N"], METALS, named=True)
    assert [name for name, _ in read_adsorbates(["H", "O", "SH"], {1, 8}, named=False)] == ["H", "O"]
    with pytest.raises(ConfigError, match="none of the usual adsorbates"):
        read_adsorbates(["O"], {29}, named=False)


def test_a_lone_atom_has_nothing_above_it():
    ((_, atoms),) = read_adsorbates(["O"], METALS, named=True)
    assert atoms == Atoms("O", tags=[2])


def test_over_a_wide_channel_an_adsorbate_stands_at_the_height_of_the_topmost_atom():
    slab = Atoms("Cu2", [[0, 0, 0], [0, 0, 2]], cell=[9, 9, 20], pbc=True)
    ((_, carbon_monoxide),) = read_adsorbates(["CO"], METALS, named=True)
    together = place(slab, carbon_monoxide, np.array([4.5, 4.5]), np.random.default_rng(0))
    assert together.positions[2:, 2].min() == pytest.approx(2.0)
