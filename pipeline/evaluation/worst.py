"""The systems that a model is most wrong about: a bounded number of them, kept while an evaluation runs."""

import heapq
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.data.system import System
from molkd.pipeline.evaluation.breakdown import formula
from molkd.pipeline.units import MILLI

N_WORST = 20
RANKINGS = ("energy", "forces")


@dataclass(frozen=True)
class WorstSystem:
    """One system with its errors."""

    source: str  # file and number in it
    id: str  # content id, hex
    formula: str
    n_atoms: int
    energy_error: float | None  # eV, predicted minus label; None: no label
    force_error: float | None  # eV/A, length of the largest error on a labelled free atom
    atom: int | None  # which atom that is

    def to_report(self) -> dict[str, Any]:
        """Return meV and meV/A."""
        plain = asdict(self)
        energy, force = plain.pop("energy_error"), plain.pop("force_error")
        return plain | {
            "energy_error_meV": None if energy is None else MILLI * energy,
            "force_error_meV_A": None if force is None else MILLI * force,
        }


@dataclass(frozen=True, eq=False)
class KeptSystem:
    """One system with what was predicted, to be written to a file."""

    system: System
    energy: float  # eV
    forces: NDArray[np.float64]  # (N, 3) eV/A
    summary: WorstSystem


class WorstSystems:
    """Keeps the `size` systems with the largest error in the energy, and as many by the largest force error.

    Of equal errors the system that came first is kept, so the outcome does not depend on the batch size.
    """

    def __init__(self, size: int = N_WORST) -> None:
        self._size = size
        self._n_seen = 0
        self._heaps: dict[str, list[tuple[float, int, KeptSystem]]] = {name: [] for name in RANKINGS}

    def add(self, system: System, energy: float, forces: NDArray[np.float64]) -> None:
        """Offer a system with its predicted energy in eV and forces (N, 3) in eV/A."""
        self._n_seen += 1
        has_energy = bool(np.isfinite(system.energy))
        lengths = np.linalg.norm(forces - system.forces, axis=1)  # (N,) eV/A
        counts = ~system.fixed & np.isfinite(lengths)
        atom = int(np.argmax(np.where(counts, lengths, -1.0))) if counts.any() else None
        errors = {
            "energy": abs(energy - system.energy) if has_energy else None,
            "forces": float(lengths[atom]) if atom is not None else None,
        }
        wanted = [name for name, error in errors.items() if error is not None and self._enters(name, error)]
        if not wanted:
            return
        summary = WorstSystem(
            source=system.source,
            id=system.id.hex(),
            formula=formula(system),
            n_atoms=system.n_atoms,
            energy_error=energy - system.energy if has_energy else None,
            force_error=errors["forces"],
            atom=atom,
        )
        kept = KeptSystem(system, energy, forces, summary)
        for name in wanted:
            entry = (float(errors[name] or 0.0), -self._n_seen, kept)
            push = heapq.heappush if len(self._heaps[name]) < self._size else heapq.heapreplace
            push(self._heaps[name], entry)

    def ranked(self, by: str) -> list[KeptSystem]:
        """Return the worst first, by "energy" or "forces"."""
        return [kept for _, _, kept in sorted(self._heaps[by], key=lambda entry: entry[:2], reverse=True)]

    def result(self) -> dict[str, list[WorstSystem]]:
        """Return both lists without the structures."""
        return {by: [kept.summary for kept in self.ranked(by)] for by in RANKINGS}

    def _enters(self, name: str, error: float) -> bool:
        heap = self._heaps[name]
        return self._size > 0 and (len(heap) < self._size or error > heap[0][0])
