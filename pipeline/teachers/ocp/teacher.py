"""A checkpoint of OCP or fairchem v1 as teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from molkd.pipeline.errors import ConfigError, TeacherError
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.teachers.common import default_name, file_sha256, group_name
from molkd.pipeline.teachers.interface import TeacherInfo
from molkd.pipeline.teachers.ocp.architecture import Architecture, read_architecture, read_config
from molkd.pipeline.teachers.ocp.normalization import read_label_scale, reference_in_words
from molkd.pipeline.teachers.ocp.reading import read_torch_file
from molkd.pipeline.teachers.ocp.scale_factors import fill_scale_factors
from molkd.pipeline.teachers.ocp.weights import average_weights, fill_model, read_weights
from molkd.pipeline.teachers.potential_teacher import PotentialTeacher
from molkd.pipeline.teachers.taps import places

_OF_TRAINING = ("epoch", "step")


def load_ocp(
    path: Path, device: torch.device, dtype: torch.dtype, scale_file: Path | None = None
) -> PotentialTeacher:
    """Load a checkpoint; nothing in it is executed.

    Parameters
    ----------
    path : file that OCP's or fairchem's trainer wrote, raw or averaged weights
    scale_file : scale factors, for checkpoints that hold none

    Raises
    ------
    TeacherError
        If the file is no such checkpoint, asks for code to be run, holds an architecture or a setting that is
        not supported, lacks tensors or scale factors, or has too many.
    """
    checkpoint = read_torch_file(path)
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise TeacherError(
            f"{path}: is no checkpoint of OCP or fairchem, it should hold a state_dict and a config; "
            "give a file that its trainer wrote"
        )
    checkpoint = {**checkpoint, "config": read_config(checkpoint, path)}
    architecture = read_architecture(checkpoint["config"], path)
    model: Any = _build(architecture, path)
    weights = read_weights(checkpoint, architecture.heads, path)
    averaged = average_weights(checkpoint, weights, model, path)
    fill_model(model, {**weights, **averaged}, path)
    source = fill_scale_factors(model, weights, checkpoint, architecture.scale_file, path, scale_file)
    model.eval()
    scale = read_label_scale(checkpoint, path)
    sha256 = file_sha256(path)
    config: dict[str, Any] = model.config.model_dump(mode="json")
    potential = Potential(model, scale, {"model": config}, sha256)
    if scale_file is not None:  # other factors are another teacher
        config = {**config, "scale_file_sha256": file_sha256(scale_file)}
    extra: dict[str, object] = {
        "weights": "moving average (ema)" if averaged else "as in the state_dict",
        "label_scale": scale.to_dict(),
    }
    if source:
        extra["scale_factors"] = source
    extra |= {key: checkpoint[key] for key in _OF_TRAINING if isinstance(checkpoint.get(key), int | float)}
    name = type(model).__name__
    info = TeacherInfo(
        name=group_name(default_name(path)),
        architecture=name,
        weights_sha256=sha256,
        config=config,
        taps=places(name, model.signals),
        licence="",
        citation="",
        energy_reference=reference_in_words(checkpoint),
        n_parameters=sum(p.numel() for p in model.parameters()),
        extra=extra,
    )
    return PotentialTeacher(potential, info, device, dtype)


def _build(architecture: Architecture, path: Path) -> Any:
    try:
        return build_model(architecture.config)
    except ConfigError as error:
        raise TeacherError(
            f"{path}: its config cannot be followed: {error}; take another checkpoint"
        ) from None
