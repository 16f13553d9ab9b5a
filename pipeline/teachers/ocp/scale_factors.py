"""Scale factors of a checkpoint, which have been kept in four places over the years.

A model without them still runs and gives numbers without meaning, so nothing is loaded before all are known.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molkd.pipeline.errors import TeacherError
from molkd.pipeline.models.ocp_blocks import scale_factors
from molkd.pipeline.teachers.ocp.reading import as_number, read_torch_file
from molkd.pipeline.teachers.ocp.weights import SCALE_SUFFIX

log = logging.getLogger(__name__)

_SAME = 1e-5  # relative; the same factors written as text or in half precision differ by less
Factors = dict[str, float]


def fill_scale_factors(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    checkpoint: Mapping[str, Any],
    in_config: Any,
    path: Path,
    scale_file: Path | None,
) -> str:
    """Set the model's scale factors from wherever they are.

    Parameters
    ----------
    model : its `ScaleFactor` modules are set
    weights : state_dict by our names
    checkpoint : content of the file
    in_config : `scale_file` of the checkpoint's config: a path, the factors themselves, or None
    path : the checkpoint
    scale_file : file of factors given by the user

    Returns
    -------
    str
        Where they came from, in words.

    Raises
    ------
    TeacherError
        If one is known nowhere, or two places disagree.
    """
    modules = scale_factors(model)
    if not modules:
        if scale_file is not None:
            raise TeacherError(
                f"{scale_file}: {type(model).__name__} has no scale factors; leave --scale-file out"
            )
        return ""
    places = dict(_places(weights, checkpoint, in_config, path, scale_file))
    named = _path_in_config(in_config, path)
    if not any(places.values()) and named is not None:
        places[str(named)] = read_scale_file(named)
    factors: Factors = {}
    origin: dict[str, str] = {}
    for place, values in places.items():
        for name, value in values.items():
            if name in factors and not math.isclose(value, factors[name], rel_tol=_SAME):
                raise TeacherError(
                    f"{path}: scale factor {name} is {factors[name]:.7g} in {origin[name]} and {value:.7g} "
                    f"in {place}; find out which belong to these weights, and leave the others out"
                )
            factors.setdefault(name, value)
            origin.setdefault(name, place)
    missing = [name for name in modules if name not in factors]
    if missing:
        raise TeacherError(_unknown(missing, len(modules), in_config, path))
    left_over = [name for name in factors if name not in modules]
    if left_over:
        log.warning("%s: scale factors of no layer of the model: %s", path, ", ".join(left_over))
    with torch.no_grad():
        for name, module in modules.items():
            module.scale_factor.fill_(factors[name])
    return ", ".join(dict.fromkeys(origin[name] for name in modules))


def read_scale_file(path: Path) -> Factors:
    """Read factors by layer from JSON or a file of `torch.save`; nothing in it is executed.

    Raises
    ------
    TeacherError
        If the file cannot be read, or holds anything but positive numbers.
    """
    if path.suffix != ".json":
        return _as_factors(read_torch_file(path), str(path))
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path}: cannot be read as JSON ({error}); check the file") from None
    return _as_factors(content, str(path))


def _places(
    weights: Mapping[str, Tensor],
    checkpoint: Mapping[str, Any],
    in_config: Any,
    path: Path,
    scale_file: Path | None,
) -> Iterator[tuple[str, Factors]]:
    in_weights = {name: value for name, value in weights.items() if name.endswith(SCALE_SUFFIX)}
    yield "the state_dict", _as_factors(in_weights, f"{path}: state_dict")
    if checkpoint.get("scale_dict") is not None:
        yield "scale_dict", _as_factors(checkpoint["scale_dict"], f"{path}: scale_dict")
    if isinstance(in_config, Mapping):
        yield "scale_file of the config", _as_factors(in_config, f"{path}: scale_file of its config")
    if scale_file is not None:
        yield str(scale_file), read_scale_file(scale_file)


def _as_factors(content: Any, where: str) -> Factors:
    """Return the fitted factors by the name of their layer; zero means not fitted."""
    if not isinstance(content, Mapping):
        raise TeacherError(f"{where}: expected scale factors by name, found {type(content).__name__}")
    factors: Factors = {}
    for key, value in content.items():
        if key == "comment":  # of JSON files
            continue
        number = as_number(value)
        if number is None or not 0 <= number < math.inf:
            raise TeacherError(
                f"{where}: the scale factor {key} should be a positive number, found {value!r}"
            )
        if number > 0:
            factors[str(key).removeprefix("module.").removesuffix(SCALE_SUFFIX)] = number
    return factors


def _path_in_config(in_config: Any, path: Path) -> Path | None:
    """Return the file that the config names, if it is there: as it stands, or beside the checkpoint."""
    if not isinstance(in_config, str) or not in_config:
        return None
    candidates = (Path(in_config), path.parent / in_config)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _unknown(missing: list[str], n_all: int, in_config: Any, path: Path) -> str:
    named = f" (its config names {in_config}, which is not here)" if isinstance(in_config, str) else ""
    which = "all" if len(missing) == n_all else ", ".join(missing)
    return (
        f"{path}: {len(missing)} of {n_all} scale factors are unknown{named}: {which}. Without them the "
        "predictions mean nothing. Give the file with --scale-file (JSON or .pt, factor by layer; for a "
        "model trained without scaling a file of ones)"
    )
