"""A teacher, or a student loaded as one, as an ASE calculator."""

from typing import Any, cast

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from molkd.pipeline.data.ase_source import record_from_atoms
from molkd.pipeline.data.records import build_system
from molkd.pipeline.graphs.batch import batch_from_systems, to_device
from molkd.pipeline.scope import Scope
from molkd.pipeline.teachers.interface import Teacher


class TeacherCalculator(Calculator):
    """Energy in eV and forces in eV/A of one structure at a time; neighbour lists are built for each.

    Parameters
    ----------
    teacher : what `load_teacher` gives

    Raises
    ------
    ModelError
        When asked for a structure that the teacher was not made for.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012  # as ASE has it

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self._scope = Scope(teacher.info.name, teacher.atomic_numbers, teacher.neighbor_rule)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Any = ("energy",),
        system_changes: Any = all_changes,
    ) -> None:
        """Compute energy and forces of `atoms` and keep them as `results`."""
        super().calculate(atoms, properties, system_changes)
        system = build_system(
            record_from_atoms(cast("Atoms", self.atoms)), (), (), "structure of the calculator"
        )
        self._scope.check(system)
        batch = batch_from_systems([system], self.teacher.neighbor_rule, self.teacher.dtype)
        found = self.teacher.compute(to_device(batch, self.teacher.device), ("energy", "forces"))
        self.results = {
            "energy": float(found["energy"][0]),
            "forces": found["forces"].double().cpu().numpy(),
        }
