"""What all adapters share: naming, checking what is asked, file hashes and sums over atoms."""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from molkd.cache_schema.fields import (
    FieldSpec,
    atomic_energies_spec,
    energy_spec,
    forces_spec,
    node_spec,
    v2v_spec,
)
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.graphs.batch import Batch

_ROLES = ("best", "last", "best_checkpoint", "checkpoint")  # of files in a run's folder, ours and OCP's


def check_signals(asked: Collection[str], offered: Mapping[str, FieldSpec], teacher: str) -> None:
    """Refuse signals that the teacher does not give.

    Raises
    ------
    TeacherError
        Naming every unknown signal and all that exist.
    """
    unknown = sorted(set(asked) - set(offered))
    if unknown:
        raise TeacherError(
            f"teacher {teacher} does not give {', '.join(unknown)}; it gives {', '.join(offered)}"
        )


def usual_signals(n_scalars: int, n_vectors: int) -> dict[str, FieldSpec]:
    """Return energy, forces, atomic energies and both kinds of node features, by name."""
    specs = (
        energy_spec(),
        forces_spec(),
        atomic_energies_spec(),
        node_spec(n_scalars),
        v2v_spec(n_vectors),
    )
    return {spec.name: spec for spec in specs}


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def group_name(text: str) -> str:
    """Return `text` as the name of a teacher's group in a store: letters, digits, "-", "_", "."."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "teacher"


def default_name(path: Path) -> str:
    """Return the run's name for a run folder and for files called after their role, else the file's own."""
    path = path.resolve()
    if path.is_dir():
        return path.name
    return path.parent.name if path.stem in _ROLES else path.stem


def sum_over_atoms(atomic_energies: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, " S"]:
    """Add atomic energies up per system, in their own precision."""
    totals = atomic_energies.new_zeros(batch.n_systems)
    return totals.index_add(0, batch.system_idx, atomic_energies)


def minus_gradient(energies: Float[Tensor, " N"], positions: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """Return the forces -dE/dx; atoms that no edge touches get zero."""
    with torch.enable_grad():  # for the sum; the caller may have switched gradients off
        total = energies.sum()
    (gradient,) = torch.autograd.grad(total, positions, materialize_grads=True)
    return -gradient
