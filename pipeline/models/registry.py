"""Which architectures and presets exist, and how to get a model from a name."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from molkd.pipeline.config import make_config, read_yaml
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.models.gemnet_oc.model import GemNetOC
from molkd.pipeline.models.painn import PaiNN
from molkd.pipeline.models.schnet import SchNet

MODELS: dict[str, type[GemNetOC] | type[PaiNN] | type[SchNet]] = {
    "gemnet_oc": GemNetOC,
    "painn": PaiNN,
    "schnet": SchNet,
}
_PRESETS = Path(__file__).parent / "presets"


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """Build a model with fresh weights from torch's current seed.

    Parameters
    ----------
    config : mapping
        ``name``, a key of `MODELS`, and the architecture's own settings.

    Raises
    ------
    ConfigError
        If the architecture or a setting is unknown or out of range.
    """
    name = config.get("name")
    if name not in MODELS:
        raise ConfigError(f"unknown architecture {name!r}; valid names: {', '.join(MODELS)}")
    model: Any = MODELS[name]
    built: nn.Module = model(make_config(model.config_class, config))
    return built


def preset_names() -> list[str]:
    """Return the names that `load_preset` takes, the ones that choose by periodicity included."""
    files = {path.stem for path in _PRESETS.glob("*.yaml")}
    families = {name.removesuffix("-oc20") for name in files if name.endswith("-oc20")}
    return sorted(files | families)


def load_preset(name: str, *, periodic: bool) -> dict[str, Any]:
    """Return a preset: ``model`` (for `build_model`) and ``training`` (hyper-parameters).

    Parameters
    ----------
    name : str
        A file name in ``presets/`` without its ending; without ``-oc20`` or ``-coll`` the paper's setting for
        periodic or molecular data is taken.
    periodic : bool
        Whether the data are periodic. Sets the model's ``use_pbc``.

    Raises
    ------
    ConfigError
        If there is no such preset; names the nearest one.
    """
    path = _PRESETS / f"{name}.yaml"
    if not path.exists():
        path = _PRESETS / f"{name}-{'oc20' if periodic else 'coll'}.yaml"
    if name not in preset_names():
        nearest = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown preset {name!r}; did you mean {nearest}? valid names: {', '.join(preset_names())}"
        )
    preset = read_yaml(path)
    preset["model"]["use_pbc"] = periodic
    return preset
