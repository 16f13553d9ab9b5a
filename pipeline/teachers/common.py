"""What all adapters share: naming, checking what is asked, file hashes and sums over atoms."""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.graphs.batch import Batch


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


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def group_name(text: str) -> str:
    """Return `text` as the name of a teacher's group in a store: letters, digits, "-", "_", "."."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "teacher"


def sum_over_atoms(atomic_energies: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, " S"]:
    """Add atomic energies up per system, in their own precision."""
    totals = atomic_energies.new_zeros(batch.n_systems)
    return totals.index_add(0, batch.system_idx, atomic_energies)


def minus_gradient(energies: Float[Tensor, " N"], positions: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """Return the forces -dE/dx; atoms that no edge touches get zero."""
    (gradient,) = torch.autograd.grad(energies.sum(), positions, materialize_grads=True)
    return -gradient
