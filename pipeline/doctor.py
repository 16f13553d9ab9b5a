"""What a bug report needs: versions, devices, teachers at hand, and whether a cache folder can be shared."""

import os
import platform
import shutil
import stat
import uuid
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from molkd.pipeline.teachers.load import available_teachers

_PACKAGES = (
    "molkd", "torch", "torch-geometric", "zarr", "numcodecs", "dask", "lmdb", "numpy", "ase", "vesin",
    "pydantic", "safetensors", "tensorboard",
)  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """What `kd doctor` prints."""

    python: str
    system: str
    packages: dict[str, str]
    devices: dict[str, str]
    teachers: dict[str, str]
    cache_folder: dict[str, str]
    problems: list[str]


def diagnose(folder: Path) -> Diagnosis:
    """Look at this machine and at a folder that is to hold caches; changes nothing."""
    rights, problems = _folder_rights(folder)
    return Diagnosis(
        python=platform.python_version(),
        system=platform.platform(),
        packages={name: _version(name) for name in _PACKAGES},
        devices=_devices(),
        teachers=available_teachers(),
        cache_folder=rights,
        problems=problems,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return devices


def _folder_rights(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Try what stage one does in a folder: make a file, force it to disk, rename it."""
    problems: list[str] = []
    if not folder.is_dir():
        return {"path": str(folder)}, [f"{folder}: no such folder; make it, or name another"]
    umask = os.umask(0)
    os.umask(umask)
    mode = folder.stat().st_mode
    rights = {
        "path": str(folder.resolve()),
        "free": f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB",
        "file system": _file_system(folder),
        "mode": stat.filemode(mode),
        "umask": f"{umask:04o}",
        "group can read new files": "no" if umask & 0o040 else "yes",
        "new files keep the folder's group (setgid)": "yes" if mode & stat.S_ISGID else "no",
    }
    probe = folder / f".tmp-kd-doctor-{uuid.uuid4().hex[:8]}"
    try:
        with probe.open("wb") as file:
            file.write(b"probe")
            os.fsync(file.fileno())
        probe = probe.replace(probe.with_suffix(".renamed"))
        rights["write and rename"] = "yes"
    except OSError as error:
        rights["write and rename"] = "no"
        problems.append(f"{folder}: cannot be written ({error.strerror}); ask its owner, or cache elsewhere")
    finally:
        probe.unlink(missing_ok=True)
    if umask & 0o040:
        problems.append(
            f"umask {umask:04o}: colleagues cannot read what you cache; run umask 0027 or 0002 first"
        )
    return rights, problems


def _file_system(folder: Path) -> str:
    """Name of the file system that holds a folder, where the kernel tells."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    best, name = "", "unknown"
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split()
        if folder.resolve().is_relative_to(point) and len(point) > len(best):
            best, name = point, kind
    return name
