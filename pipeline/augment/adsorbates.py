"""Adsorbates: the atom that binds below, the rest above it, set down on a slab until it touches."""

import re
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.collections import g2
from ase.data import covalent_radii
from numpy.typing import NDArray

from molkd.pipeline.augment.frame import to_atoms
from molkd.pipeline.augment.sites import lateral_vectors
from molkd.pipeline.augment.slabs import require_known
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import ConfigError

ADSORBATE_TAG = 2  # OC20's
_MAX_TILT = 20.0  # degrees away from the surface's normal
# Intermediates that ASE's collection lacks (A), from usual bond lengths and angles; a relaxation follows.
_OWN = {
    "NNH": ("NNH", [[0, 0, 0], [0, 0, 1.20], [0.95, 0, 1.59]]),
    "NNH2": ("NNHH", [[0, 0, 0], [0, 0, 1.25], [0.87, 0, 1.78], [-0.87, 0, 1.78]]),
    "OOH": ("OOH", [[0, 0, 0], [0, 0, 1.40], [0.94, 0, 1.63]]),
    "COOH": ("COOH", [[0, 0, 0], [-1.04, 0, 0.60], [1.16, 0, 0.68], [1.12, 0, 1.65]]),
}


def read_adsorbates(
    names: Collection[str], known: Collection[int], *, named: bool
) -> list[tuple[str, Atoms]]:
    """Return the adsorbates that the user names; of the default list those of `known` elements.

    Raises
    ------
    ConfigError
        If a name is neither ASE's nor ours nor a file, or (if `named`) holds an element that is not known.
    """
    found = []
    for name in names:
        for label, atoms in _read(name):
            if named:
                require_known(label, atoms, known)
            elif not set(atoms.numbers) <= set(known):
                continue
            found.append((label, atoms))
    if not found:
        raise ConfigError("the teacher knows none of the usual adsorbates; name others with --adsorbate")
    return found


def _read(name: str) -> list[tuple[str, Atoms]]:
    text, _, binding = name.removeprefix("*").partition(":")
    if text in _OWN:
        symbols, positions = _OWN[text]
        return [(name, _standing(Atoms(symbols, positions), binding, name))]
    if text in g2.names:
        return [(name, _standing(molecule(text), binding, name))]
    if Path(text).exists():
        with closing(open_source(text)) as source:
            systems = [source.read(k) for k in range(len(source))]
        return [(s.source, _standing(to_atoms(s), binding, s.source)) for s in systems]
    raise ConfigError(
        f"--adsorbate {name}: is no file, no molecule that ASE knows by name (CO, OH, CH3, ...) and none of "
        f"{', '.join(_OWN)}; write NAME, or NAME:SYMBOL for the atom that binds"
    )


def _standing(atoms: Atoms, binding: str, name: str) -> Atoms:
    """Put the binding atom at the origin and the rest above it; it is the first of its element.

    Unless the user says which, the first element in the name that is no hydrogen binds, or in the file.
    """
    symbols = list(atoms.symbols)
    if binding and binding not in symbols:
        raise ConfigError(f"--adsorbate {name}: has no atom {binding}")
    named = [s for s in re.findall("[A-Z][a-z]?", name) if s != "H" and s in symbols]
    other = [s for s in symbols if s != "H"]
    binding = binding or next(iter(named or other), "H")
    wanted = [k for k, s in enumerate(symbols) if s == binding]
    first = wanted[0]
    atoms = Atoms(atoms.numbers, atoms.positions - atoms.positions[first], tags=[ADSORBATE_TAG] * len(atoms))
    if len(atoms) > 1:
        up = np.delete(atoms.positions, first, axis=0).mean(axis=0)
        if np.linalg.norm(up) > 1e-3:
            atoms.rotate(up, (0, 0, 1))
    return atoms


def place(slab: Atoms, adsorbate: Atoms, xy: NDArray[np.float64], random: np.random.Generator) -> Atoms:
    """Return the slab with the adsorbate over `xy` (2,), turned and tilted at random, touching it.

    It stands as low as it can with no atom nearer to one of the slab than the sum of covalent radii.
    """
    adsorbate = adsorbate.copy()
    adsorbate.rotate(float(random.uniform(0, 360)), "z", center=(0, 0, 0))
    tilt, azimuth = random.uniform(0, _MAX_TILT), random.uniform(0, 2 * np.pi)
    adsorbate.rotate(float(tilt), (np.cos(azimuth), np.sin(azimuth), 0), center=(0, 0, 0))
    adsorbate.positions[:, :2] += xy
    pairs = adsorbate.positions[:, None, :2] - slab.positions[None, :, :2]
    sideways = np.linalg.norm(lateral_vectors(pairs, np.asarray(slab.cell[:2, :2])), axis=-1)  # (A, N)
    reach = covalent_radii[adsorbate.numbers][:, None] + covalent_radii[slab.numbers][None, :]
    above = np.sqrt(np.maximum(reach**2 - sideways**2, 0.0))
    needed = slab.positions[None, :, 2] + above - adsorbate.positions[:, None, 2]
    # Over a channel that nothing is in reach of, no atom sinks below the topmost one.
    channel = slab.positions[:, 2].max() - adsorbate.positions[:, 2].min()
    touching = sideways < reach
    adsorbate.positions[:, 2] += np.where(touching, needed, -np.inf).max() if touching.any() else channel
    constraint = slab.constraints
    together: Atoms = slab.copy()
    together.set_constraint()
    together += adsorbate
    together.set_constraint(constraint)
    return together
