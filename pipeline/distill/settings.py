"""From flags, YAML file and preset to one TrainConfig."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import (
    TrainConfig,
    kd_settings,
    make_config,
    merged,
    parse_assignments,
    parse_groups,
    read_yaml,
)
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.models.registry import load_preset
from molkd.pipeline.places import by_short_name

_TRAINING_FLAGS = {"epochs": "max_epochs", "steps": "max_steps", "batch_size": "batch_size", "lr": "lr"}


def resolve(config_file: Path | None, assignments: Sequence[str], flags: Mapping[str, Any]) -> TrainConfig:
    """Merge preset < YAML < --set < flags; where none of them names losses, the run chooses (`kd_auto`).

    Parameters
    ----------
    flags : of `kd train-student`, only those given; `kd_terms` holds the texts of --kd

    Raises
    ------
    ConfigError
        If a setting is unknown or out of range, or flags do not go together.
    """
    flags = dict(flags)
    terms = flags.pop("kd_terms", ())
    head, loss = flags.pop("kd_head", "linear"), flags.pop("kd_loss", "mse")
    if (head, loss) != ("linear", "mse") and set(terms) <= {"auto", "none"}:
        raise ConfigError(
            "--kd-head and --kd-loss go with losses that --kd names, as in --kd n2n; here it names none"
        )
    training = {name: flags.pop(flag) for flag, name in _TRAINING_FLAGS.items() if flag in flags}
    if mix := _mixed(flags.pop("mix", ()), flags.pop("mix_share", ()), flags.pop("mix_weight", ())):
        flags["mix"] = mix
    if "test" in flags:
        flags["test"] = by_short_name(flags["test"], "--test")
    if "groups" in flags:
        flags["test_groups"] = parse_groups(flags.pop("groups"))
    if terms:
        flags |= kd_settings(terms, head, loss)
    if training:
        flags["training"] = training
    cache = Cache.open(flags["store"])
    asked = merged(read_yaml(config_file) if config_file else {}, parse_assignments(assignments), flags)
    if not {"kd", "kd_auto"} & asked.keys():
        asked["kd_auto"] = True
    return train_config(flags["student"], asked, periodic=bool(cache.pbc.any()))


def train_config(student: str, *layers: Mapping[str, Any], periodic: bool) -> TrainConfig:
    """Return the settings of a run: the preset of the student, then the layers; later wins.

    Parameters
    ----------
    periodic : whether the data are; says which preset a name without -oc20 or -coll stands for

    Raises
    ------
    ConfigError
        If there is no such preset, or a setting is unknown or out of range.
    """
    return make_config(TrainConfig, load_preset(student, periodic=periodic), *layers)


def _mixed(
    stores: Sequence[Path | str], shares: Sequence[float], weights: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the further stores of --mix with their shares and weights, given once for all or for each."""
    mixed: list[dict[str, Any]] = [{"store": store} for store in stores]
    for name, values in (("share", shares), ("weight", weights)):
        if values and (not stores or len(values) not in (1, len(stores))):
            raise ConfigError(
                f"--mix-{name} is given {len(values)} times for {len(stores)} --mix; "
                "give it once for all of them, or once for each in the same order"
            )
        for k in range(len(stores) if values else 0):
            mixed[k][name] = values[k] if len(values) > 1 else values[0]
    return mixed
