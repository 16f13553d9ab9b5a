"""Systems and a model's predictions as extended xyz, one at a time."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io.extxyz import write_xyz

from molkd.pipeline.data.system import System
from molkd.pipeline.errors import DataError


def write_extxyz(
    path: str | Path, systems: Iterable[System], predictions: Iterable[Mapping[str, Any]]
) -> int:
    """Write labels as ``energy`` and ``forces``, predictions as ``pred_energy`` and ``pred_forces``.

    Missing labels are left out, as is a prediction that is not given. The file appears under its name only
    when complete. Positions and forces have 8 decimals.

    Parameters
    ----------
    path : file to write or replace
    systems : S systems
    predictions : S mappings with ``energy`` (eV) and ``forces`` (N, 3) (eV/A)

    Returns
    -------
    n_systems : number of systems written

    Raises
    ------
    DataError
        If the file cannot be written.
    ValueError
        If there are not as many predictions as systems.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    n_systems = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for system, prediction in zip(systems, predictions, strict=True):
                write_xyz(file, [_predicted_atoms(system, prediction)])
                n_systems += 1
        partial.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error}). Choose another place, or free space."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return n_systems


def atoms_from_system(system: System) -> Atoms:
    """Return ASE Atoms with tags, fixed atoms and the labels that exist as calculator results."""
    atoms = Atoms(
        numbers=system.atomic_numbers,
        positions=system.positions,
        cell=system.cell,
        pbc=system.pbc,
        tags=system.tags if system.tags.any() else None,
    )
    if system.fixed.any():
        atoms.set_constraint(FixAtoms(mask=system.fixed))
    results: dict[str, Any] = {}
    if np.isfinite(system.energy):
        results["energy"] = system.energy
    if np.isfinite(system.forces).all():
        results["forces"] = system.forces
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _predicted_atoms(system: System, prediction: Mapping[str, Any]) -> Atoms:
    atoms = atoms_from_system(system)
    atoms.info["source"] = system.source
    if "energy" in prediction:
        atoms.info["pred_energy"] = float(prediction["energy"])
    if "forces" in prediction:
        atoms.arrays["pred_forces"] = np.asarray(prediction["forces"], dtype=np.float64).reshape(-1, 3)
    return atoms
