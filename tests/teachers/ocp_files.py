"""The reference checkpoints of tests/data/checkpoints, changed copies of them, and frames to predict."""

import tarfile
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from molkd.pipeline.data.sources import open_source

DATA = Path(__file__).parents[1] / "data"
LAYOUTS = (
    "checkpoint",
    "best_checkpoint",
    "ocp2022_scale_dict_ddp",
    "ocp2022_scale_file_dict",
    "ocp2023_state_dict_dp",
    "hydra",
)
CASES = [
    (name, layout)
    for name in ("painn", "schnet", "gemnet_oc")
    for layout in LAYOUTS
    if name != "schnet" or layout not in ("ocp2022_scale_file_dict", "hydra")
]


@cache
def unpacked(archive):
    """Folder with the content of an archive, for the whole test run."""
    folder = tempfile.TemporaryDirectory()
    with tarfile.open(DATA / archive) as file:
        file.extractall(folder.name, filter="data")
    return folder  # deleted when the interpreter ends


def checkpoint_path(name, layout):
    return Path(unpacked("checkpoints/checkpoints.tar.xz").name) / name / f"{layout}.pt"


def read(name, layout):
    """Content of a checkpoint; the numpy scalar in some is plain data."""
    return torch.load(checkpoint_path(name, layout), weights_only=False)


def changed(name, layout, change, path):
    """Write a checkpoint to `path` after `change` has worked on its content."""
    content = read(name, layout)
    path.parent.mkdir(exist_ok=True)
    torch.save(change(content) or content, path)
    return path


def settings_of(content):
    """The model's part of a config, to be changed in place."""
    config = content["config"]
    return config["model_attributes"] if isinstance(config["model"], str) else config["model"]


@cache
def frames():
    source = open_source(Path(unpacked("lmdb/lmdb.tar.xz").name) / "s2ef_pyg2_y_force")
    systems = [source.read(i) for i in range(len(source))]
    source.close()
    return systems


@cache
def expected(name, layout):
    """Energies (32,) and forces by frame of fairchem, and which frames hinge on no tie (32,)."""
    with np.load(checkpoint_path(name, layout).with_name("predictions.npz")) as file:
        own = dict(file)
    which = "ema" if layout in ("checkpoint", "best_checkpoint") else "state_dict"
    energy, forces = own[f"energy_{which}"], own[f"forces_{which}"]
    if layout == "hydra":
        with np.load(Path(unpacked("checkpoints/checkpoints.tar.xz").name) / "hydra_predictions.npz") as file:
            energy, forces = file[f"{name}_energy"], file[f"{name}_forces"]
    return energy, np.split(forces, np.cumsum(own["natoms"])[:-1]), own["unambiguous"]
