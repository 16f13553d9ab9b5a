"""Predictions beside labels in an extxyz file, frame by frame while an evaluation runs."""

import io
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from ase import Atoms
from ase.io.extxyz import write_extxyz
from numpy.typing import NDArray

from molkd.pipeline.data.system import System
from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.worst import KeptSystem, WorstSystems


class ExtxyzPredictions:
    """Context manager whose `add` fits `evaluate(on_prediction=...)`.

    Each frame has `predicted_energy` (eV) and `predicted_forces` (eV/A), the labels as `energy` and `forces`
    where they are whole, `fixed`, and the `source` of the system. The file gets its name when all is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".part")

    def __enter__(self) -> Self:
        if self._path.is_dir():  # before hours of work, not after
            raise DataError(f"{self._path}: is a folder; name a file to write to")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w", encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"{self._path}: cannot be written ({error.strerror}); choose another place"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink()

    def add_worst(self, worst: WorstSystems, most: int) -> None:
        """Write the worst systems, first by energy; `energy_rank` and `force_rank` tell their places."""
        # By the object: systems of a store that was made of several files may have one name.
        ranks: dict[int, tuple[KeptSystem, dict[str, int]]] = {}
        for key, by in (("energy_rank", "energy"), ("force_rank", "forces")):
            for rank, kept in enumerate(worst.ranked(by)[:most], start=1):
                ranks.setdefault(id(kept), (kept, {}))[1][key] = rank
        for kept, info in ranks.values():
            self.add(kept.system, kept.energy, kept.forces, **info)

    def add(self, system: System, energy: float, forces: NDArray[np.float64], **info: int) -> None:
        """Write one system with its predicted energy in eV and forces (N, 3) in eV/A, and more numbers."""
        atoms = Atoms(system.atomic_numbers, system.positions, cell=system.cell, pbc=system.pbc)
        atoms.info = {"predicted_energy": energy, "source": system.source, **info}
        atoms.arrays["predicted_forces"] = forces
        atoms.arrays["fixed"] = system.fixed
        if system.tags.any():
            atoms.set_tags(system.tags)
        if not np.isnan(system.energy):
            atoms.info["energy"] = float(system.energy)
        if not np.isnan(system.forces).any():
            atoms.arrays["forces"] = system.forces
        text = io.StringIO()
        write_extxyz(text, [atoms])
        self._file.write(text.getvalue())
