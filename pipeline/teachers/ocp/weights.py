"""The state_dict of a checkpoint under our names; averaged weights where the file keeps them apart."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molkd.pipeline.errors import TeacherError

SCALE_SUFFIX = ".scale_factor"
_WRAPPERS = re.compile(r"(module\.)+")  # of data-parallel training, once or twice
_SURPLUS = {"atomic_mass"}  # a buffer of early SchNets that nothing reads


def read_weights(checkpoint: Mapping[str, Any], heads: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    """Return the raw weights by our names, in the file's order, scale factors included.

    Parameters
    ----------
    checkpoint : content of the file
    heads : names of hydra's heads, whose prefixes are dropped along with the backbone's
    path : the file, for messages

    Raises
    ------
    TeacherError
        If there are no weights, an entry is no tensor, or two entries have one name.
    """
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not state:
        raise TeacherError(f"{path}: holds no state_dict; take a checkpoint that OCP's trainer wrote")
    prefixes = ["backbone.", *(f"output_heads.{head}." for head in heads)] if heads else []
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TeacherError(f"{path}: {name!r} in its state_dict is no tensor; take another checkpoint")
        ours = _WRAPPERS.sub("", name, count=1) if name.startswith("module.") else name
        prefix = next((p for p in prefixes if ours.startswith(p)), "")
        ours = ours.removeprefix(prefix)
        if ours in weights:
            raise TeacherError(f"{path}: two tensors of its state_dict are {ours}; take another checkpoint")
        weights[ours] = value
    return weights


def average_weights(
    checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], model: nn.Module, path: Path
) -> dict[str, Tensor]:
    """Return the moving average of the weights, which OCP predicts with and training checkpoints keep apart.

    It is a bare list of tensors in the order of the trainable parameters. A parameter with two names stands
    there once, scale factors do not.

    Returns
    -------
    dict
        Empty where a checkpoint has none: final ones hold the average in place of the raw weights.

    Raises
    ------
    TeacherError
        If the list does not fit the weights.
    """
    ema = checkpoint.get("ema")
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if shadow is None:
        return {}
    if not isinstance(shadow, list):
        raise TeacherError(
            f"{path}: its averaged weights (ema) are no list; take the run's best_checkpoint.pt"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}  # of each trainable parameter
    for name in weights:
        parameter = parameters.get(name)
        if parameter is not None and parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    fits = len(shadow) == len(names) and all(
        isinstance(value, Tensor) and value.shape == weights[aliases[0]].shape
        for value, aliases in zip(shadow, names.values(), strict=True)
    )
    if not fits:
        raise TeacherError(
            f"{path}: its averaged weights (ema) are {len(shadow)} tensors that do not fit the {len(names)} "
            "trainable ones of its state_dict; take the best_checkpoint.pt of the run"
        )
    return {name: value for value, aliases in zip(shadow, names.values(), strict=True) for name in aliases}


def fill_model(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy the weights into the model, all but scale factors.

    Raises
    ------
    TeacherError
        Naming every tensor that is missing, left over or of another shape.
    """
    expected = {k: v for k, v in model.state_dict().items() if not k.endswith(SCALE_SUFFIX)}
    given = {k: v for k, v in weights.items() if not k.endswith(SCALE_SUFFIX) and k not in _SURPLUS}
    buffers = {name for name, _ in model.named_buffers()}  # follow from the config, so a file may lack them
    missing = [name for name in expected if name not in given and name not in buffers]
    surplus = [name for name in given if name not in expected]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"left over {', '.join(surplus)}"] if surplus else []
    problems += [
        f"{name} has shape {tuple(value.shape)}, by its config {tuple(expected[name].shape)}"
        for name, value in given.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        raise TeacherError(
            f"{path}: its tensors do not fit its config: {'; '.join(problems)}; take a complete checkpoint "
            f"of {type(model).__name__}"
        )
    model.load_state_dict(given, strict=False)
    broken = [name for name in given if not torch.isfinite(given[name]).all()]
    if broken:
        raise TeacherError(f"{path}: not finite in {', '.join(broken)}; take another checkpoint of the run")
