"""From the config inside a checkpoint, of any age, to the settings of our model.

What a checkpoint's config says and our model does not offer must be what our model does anyway; otherwise the
checkpoint is refused, since its weights would silently compute something else.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from molkd.pipeline.errors import TeacherError
from molkd.pipeline.models.registry import MODELS

log = logging.getLogger(__name__)

_CLASS_NAMES = {"schnetwrap": "schnet"}  # classes called otherwise than their architecture
_HEADS = {  # hydra: the heads that make up the model of that name, and what each predicts
    "painn": {"energy": "painn_energy_head", "forces": "painn_force_head"},
    "gemnet_oc": {"energy": "gemnet_oc_energy_and_grad_force_head", "forces": "gemnet_oc_force_head"},
}
# What OCP takes where a config is silent and our defaults, the paper's, are others.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemnet_oc": {
        "cutoff": 6.0,
        "max_neighbors": 50,
        "sbf": {"name": "spherical_harmonics"},
        "direct_forces": False,
        "quad_interaction": False,
        "atom_edge_interaction": False,
        "edge_atom_interaction": False,
        "atom_interaction": False,
    }
}
_REQUIRED = {  # sizes that OCP's class has no default for
    "gemnet_oc": (
        *("num_spherical", "num_radial", "num_blocks", "num_before_skip", "num_after_skip", "num_concat"),
        *("num_atom", "num_output_afteratom", "emb_size_atom", "emb_size_edge", "emb_size_trip_in"),
        *("emb_size_trip_out", "emb_size_quad_in", "emb_size_quad_out", "emb_size_aint_in"),
        *("emb_size_aint_out", "emb_size_rbf", "emb_size_cbf", "emb_size_sbf"),
    )
}
# How graphs are made, first weights and numerics: they change nothing in what trained weights compute.
_WITHOUT_EFFECT = {"otf_graph", "use_pbc_single", "scale_file", "output_init", "scale_backprop_forces"}
_FIXED: dict[str, tuple[Any, ...]] = {  # settings that our models do not have, and the values they stand for
    "readout": ("add", "sum"),
    "num_targets": (1,),
    "num_elements": (83,),
    "symmetric_edge_symmetrization": (False,),
    "enforce_max_neighbors_strictly": (True,),
    "rbf": ({"name": "gaussian"},),
    "rbf_spherical": ({"name": "gaussian"},),
    "envelope": ({"name": "polynomial", "exponent": 5},),
    "activation": ("silu", "swish"),
    "scale_basis": (False,),
}


@dataclass(frozen=True)
class Architecture:
    """Which model of ours a checkpoint holds."""

    name: str  # key of MODELS
    settings: dict[str, Any]  # for build_model, without the name
    scale_file: Any = None  # what the config says of scale factors: a path, the factors themselves, or None
    heads: tuple[str, ...] = field(default=())  # hydra: names of the heads inside the state_dict

    @property
    def config(self) -> dict[str, Any]:
        """The settings with the name, for `build_model`."""
        return {"name": self.name, **self.settings}


def read_config(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the parts of a checkpoint's config that matter, as plain values; `scale_file` stays as it is.

    Raises
    ------
    TeacherError
        If a setting is no plain value.
    """
    config = checkpoint.get("config")
    if not isinstance(config, Mapping):
        return {}
    parts = ("model", "model_attributes", "dataset")
    return {part: _plain(config[part], part, path) for part in parts if part in config}


def read_architecture(config: Mapping[str, Any], path: Path) -> Architecture:
    """Return the architecture that a checkpoint's config describes.

    Parameters
    ----------
    config : what `read_config` gives
    path : the checkpoint, for messages

    Raises
    ------
    TeacherError
        If there is no config, the architecture is unknown, or a setting is one that our model cannot follow.
    """
    model = config.get("model")
    if isinstance(model, str):  # 2020 to 2023
        model = {**_mapping(config.get("model_attributes"), "model_attributes", path), "name": model}
    if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
        raise TeacherError(f"{path}: its config names no model; take a checkpoint that OCP's trainer wrote")
    if _short_name(model["name"]) == "hydra":
        return _from_hydra(model, path)
    name = _known_name(model["name"], path)
    settings = {key: value for key, value in model.items() if key != "name"}
    return _architecture(name, settings, path)


def _from_hydra(model: Mapping[str, Any], path: Path) -> Architecture:
    """Backbone and heads as one model, where the heads are the ones that this model has anyway."""
    backbone = dict(_mapping(model.get("backbone"), "model.backbone", path))
    heads = _mapping(model.get("heads"), "model.heads", path)
    kind = backbone.pop("model", None) or backbone.pop("name", None)
    name = _known_name(str(kind).removesuffix("_backbone").removesuffix("Backbone"), path)
    modules = {key: _short_name(str(_mapping(head, key, path).get("module"))) for key, head in heads.items()}
    own = _HEADS.get(name, {})
    needed = set(own.values())
    if not backbone.get("direct_forces", name == "painn"):
        needed.discard(own.get("forces", ""))  # it has no weights then
    found = set(modules.values())
    if not found or len(found) < len(modules) or not needed <= found <= set(own.values()):
        raise TeacherError(
            f"{path}: its heads are {', '.join(f'{k} ({v})' for k, v in modules.items()) or 'none'}; "
            f"{name} is read with {' and '.join(own.values()) or 'no separate heads'} only"
        )
    of_heads = [{k: v for k, v in head.items() if k != "module"} for head in heads.values()]
    if any(other != of_heads[0] for other in of_heads[1:]):
        raise TeacherError(f"{path}: its heads have different settings ({of_heads}); that is not supported")
    return _architecture(name, {**backbone, **of_heads[0]}, path, tuple(modules))


def _architecture(
    name: str, given: Mapping[str, Any], path: Path, heads: tuple[str, ...] = ()
) -> Architecture:
    """Sort the settings into ours, harmless ones and those that must have our model's value."""
    missing = [key for key in _REQUIRED.get(name, ()) if key not in given]
    if missing:
        raise TeacherError(
            f"{path}: its config lacks {', '.join(missing)}, which {name} cannot be built without"
        )
    known = MODELS[name].config_class.model_fields
    # None means OCP's default, as if nothing had been said.
    settings = {
        **_DEFAULTS.get(name, {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    if name == "gemnet_oc" and not settings["quad_interaction"]:
        settings.pop("sbf")  # only quadruplets look at it
    problems, ignored = [], []
    for key, value in settings.items():
        if key in known or key in _WITHOUT_EFFECT:
            continue
        if key not in _FIXED:
            ignored.append(key)
        elif value not in _FIXED[key]:
            allowed = " or ".join(map(repr, _FIXED[key]))
            problems.append(f"{key} is {value!r}, supported is {allowed}")
    if name == "painn" and settings.get("regress_forces", True) and not settings.get("direct_forces", True):
        problems.append("direct_forces is False, and then OCP's PaiNN differentiates its features, no energy")
    if problems:
        raise TeacherError(
            f"{path}: its {name} cannot be followed: {'; '.join(problems)}; take another checkpoint"
        )
    if ignored:
        log.warning(
            "%s: settings of its config that %s does not know are ignored: %s", path, name, ", ".join(ignored)
        )
    ours = {key: value for key, value in settings.items() if key in known}
    return Architecture(name, ours, given.get("scale_file"), heads)


def _known_name(text: str, path: Path) -> str:
    short = _short_name(text)
    plain = short.replace("_", "")
    plain = _CLASS_NAMES.get(plain, plain).replace("_", "")
    for name in MODELS:
        if plain == name.replace("_", ""):
            return name
    raise TeacherError(f"{path}: its architecture is {text!r}; supported are {', '.join(MODELS)}")


def _short_name(text: str) -> str:
    """Return the last part of a name that may be a class with its module, in lower case."""
    return text.rsplit(".", 1)[-1].lower()


def _plain(value: Any, where: str, path: Path) -> Any:
    """Return text, numbers, lists and mappings of them; numpy scalars and one-element tensors as numbers."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}.{k}", path) for k, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {k: v if k == "scale_file" else _plain(v, f"{where}.{k}", path) for k, v in value.items()}
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    raise TeacherError(
        f"{path}: {where} in its config is a {type(value).__name__}, expected text or a number; "
        "take a checkpoint that OCP's trainer wrote"
    )


def _mapping(value: Any, where: str, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TeacherError(
            f"{path}: {where} in its config should be a mapping, found {type(value).__name__}; "
            "take a checkpoint that OCP's trainer wrote"
        )
    return value
