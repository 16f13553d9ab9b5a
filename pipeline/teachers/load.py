"""From what a user writes after `--teacher` to a teacher; foreign packages are imported on demand."""

from importlib.util import find_spec
from pathlib import Path

import torch

from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.teachers.interface import Teacher

_FOREIGN = {"sevennet-0": ("sevenn", "pip install 'molkd[sevenn]'")}  # name: package, how to get it
_CHECKPOINTS = (".pt", ".pth", ".ckpt")
_POSSIBLE = (
    "a molkd model (.safetensors) or run folder, a checkpoint of OCP or fairchem v1 (.pt), "
    "the .npz of a schnetpack PaiNN, "
    f"or one of these names: {', '.join(_FOREIGN)}"
)


def available_teachers() -> dict[str, str]:
    """Return what can teach here: name -> "installed" or what it needs. Imports nothing."""
    teachers = {"molkd": "installed", "ocp-checkpoint": "installed", "schnetpack-painn": "installed"}
    for name, (package, remedy) in _FOREIGN.items():
        teachers[name] = "installed" if find_spec(package) else f"needs {remedy}"
    return teachers


def load_teacher(
    spec: str,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    scale_file: Path | None = None,
) -> Teacher:
    """Load the teacher that `spec` names.

    Parameters
    ----------
    spec
        Path of a molkd model (`.safetensors`), of a run folder that holds `best.safetensors`, of a checkpoint
        of OCP or fairchem v1 (`.pt`), of the `.npz` of a schnetpack PaiNN, or the name `sevennet-0`.
    device
        "auto" takes CUDA where there is one.
    dtype
        Of weights, features and forces; energies are float64 always.
    scale_file
        Scale factors, for a checkpoint of OCP that holds none.

    Raises
    ------
    TeacherError
        If `spec` is none of these, the file does not fit, a foreign package is missing, or scale factors are
        given to a teacher that takes none.
    ModelError
        If a molkd model cannot be read.
    ConfigError
        If there is no such device.
    """
    device = choose_device(device) if isinstance(device, str) else device
    path = Path(spec).expanduser()
    # Each adapter is imported on its own: one teacher needs nothing of another.
    if path.suffix in _CHECKPOINTS and path.is_file():
        from molkd.pipeline.teachers.ocp.teacher import load_ocp

        return load_ocp(path, device, dtype, scale_file)
    if scale_file is not None:
        raise TeacherError(
            f"{spec}: takes no scale factors, only checkpoints of OCP do; leave --scale-file out"
        )
    if spec.lower() == "sevennet-0":
        from molkd.pipeline.teachers.sevennet import SevenNet

        return SevenNet(device, dtype)
    if path.suffix == ".npz":
        from molkd.pipeline.teachers.schnetpack_painn import SchnetpackPaiNN

        return SchnetpackPaiNN(path, device, dtype)
    if path.suffix == ".safetensors" or path.is_dir():
        from molkd.pipeline.teachers.builtin import load_builtin

        return load_builtin(path, device, dtype)
    found = (
        "is not a kind of file that a teacher comes in" if path.exists() else "is no file and no known name"
    )
    raise TeacherError(f"{spec}: {found}; give {_POSSIBLE}")
