"""From what a user writes after `--teacher` to a teacher; foreign packages are imported on demand."""

from importlib.util import find_spec
from pathlib import Path

import torch

from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.teachers.interface import Teacher

_FOREIGN = {"sevennet-0": ("sevenn", "pip install 'molkd[sevenn]'")}  # name: package, how to get it
_POSSIBLE = (
    "a molkd model (.safetensors) or run folder, the .npz of a schnetpack PaiNN, "
    f"or one of these names: {', '.join(_FOREIGN)}"
)


def available_teachers() -> dict[str, str]:
    """Return what can teach here: name -> "installed" or what it needs. Imports nothing."""
    teachers = {"molkd": "installed", "schnetpack-painn": "installed"}
    for name, (package, remedy) in _FOREIGN.items():
        teachers[name] = "installed" if find_spec(package) else f"needs {remedy}"
    return teachers


def load_teacher(
    spec: str, *, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32
) -> Teacher:
    """Load the teacher that `spec` names.

    Parameters
    ----------
    spec
        Path of a molkd model (`.safetensors`), of a run folder that holds `best.safetensors`, of the `.npz`
        of a schnetpack PaiNN, or the name `sevennet-0`.
    device
        "auto" takes CUDA where there is one.
    dtype
        Of weights, features and forces; energies are float64 always.

    Raises
    ------
    TeacherError
        If `spec` is none of these, the file does not fit, or a foreign package is missing.
    ModelError
        If a molkd model cannot be read.
    ConfigError
        If there is no such device.
    """
    device = choose_device(device) if isinstance(device, str) else device
    # Each adapter is imported on its own: one teacher needs nothing of another.
    if spec.lower() == "sevennet-0":
        from molkd.pipeline.teachers.sevennet import SevenNet

        return SevenNet(device, dtype)
    path = Path(spec).expanduser()
    if path.suffix == ".npz":
        from molkd.pipeline.teachers.schnetpack_painn import SchnetpackPaiNN

        return SchnetpackPaiNN(path, device, dtype)
    if path.suffix == ".safetensors" or path.is_dir():
        from molkd.pipeline.teachers.builtin import BuiltinTeacher

        return BuiltinTeacher(path, device, dtype)
    found = (
        "is not a kind of file that a teacher comes in" if path.exists() else "is no file and no known name"
    )
    raise TeacherError(f"{spec}: {found}; give {_POSSIBLE}")
