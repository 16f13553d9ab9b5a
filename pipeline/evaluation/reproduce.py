"""The command that makes a run again, from the settings kept in its folder."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from molkd.pipeline.config import TrainConfig, kd_settings, parse_assignments
from molkd.pipeline.distill.settings import train_config
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.places import short_name

_FLAGS = {
    "training.max_steps": "--steps", "training.max_epochs": "--epochs", "training.batch_size": "--batch-size",
    "training.lr": "--lr", "val": "--val", "teacher": "--teacher", "seed": "--seed", "label": "--label",
}  # fmt: skip
_WHOLE = ("test", "test_groups")  # mappings whose keys are names of the user's


def train_command(config: TrainConfig, folder: Path) -> str:
    """Return the `kd train-student` command that comes to the same settings.

    Losses that a run chose are named. What the preset says is left out. Where flags and --set would not bring
    the settings back exactly, the command takes them from the run's own config.yaml.

    Parameters
    ----------
    folder : the run, whose config.yaml is named where it is needed
    """
    start = ["kd", "train-student", str(config.store), "--student", config.student]
    end = ["--out", str(config.out)]
    said = _said(config)
    if said is None:
        chosen = [["--kd", term.text] for term in config.kd] if config.kd_auto else []
        said = [["--config", str(folder / "config.yaml")], *chosen]
    return _joined([start, *said, end])


def report_command(
    runs: Sequence[Path],
    out: Path,
    *,
    teacher: str | None,
    test: Sequence[Path | str],
    groups: Sequence[str],
    others: Mapping[str, object],
) -> str:
    """Return the `kd report` command; `others` are further options by flag, None where not given."""
    parts = [["kd", "report"], *([str(run)] for run in runs), ["--out", str(out)]]
    parts += [["--teacher", teacher]] if teacher else []
    parts += [["--test", str(place)] for place in test]
    parts += [["--group", text] for text in groups]
    for flag, value in others.items():
        if value is not None:
            parts.append([flag] if value is True else [flag, str(value)])
    return _joined(parts)


def _joined(parts: list[list[str]]) -> str:
    """Return one command, one part a line, ready for a shell."""
    return " \\\n  ".join(shlex.join(part) for part in parts if part)


def _said(config: TrainConfig) -> list[list[str]] | None:
    """Return settings beyond the preset's as flags; None if they would not come back the same."""
    losses = [term.text for term in config.kd] or ["auto" if config.kd_auto else "none"]
    if config.kd:
        config = config.model_copy(update={"kd_auto": False})  # what a run chose is said outright
    place = {"store": config.store, "out": config.out, "student": config.student}
    periodic = bool(config.model.get("use_pbc"))
    try:
        plain = train_config(config.student, place, periodic=periodic)
    except ConfigError:
        return None  # a preset that this version does not have
    changes = _differing(config.model_dump(mode="json"), plain.model_dump(mode="json"))
    tests, groups = changes.pop("test", {}), changes.pop("test_groups", {})
    for key in ("kd", "kd_auto"):
        changes.pop(key, None)
    flags = {key: changes.pop(key) for key in _FLAGS if changes.get(key) not in (None, "")}
    assignments = [f"{key}={_yaml(value)}" for key, value in changes.items()]
    named = {short_name(config.test[name]): path for name, path in tests.items()}
    values = parse_assignments([*assignments, *(f"{key}={_yaml(value)}" for key, value in flags.items())])
    given = {**place, **kd_settings(losses), "test": named, "test_groups": groups}
    try:
        again = train_config(config.student, values, given, periodic=periodic)
    except ConfigError:
        return None
    return (
        [
            *(["--kd", text] for text in losses),
            *([_FLAGS[key], str(value)] for key, value in flags.items()),
            *(["--test", str(path)] for path in tests.values()),
            *(["--group", f"{name}={','.join(members)}"] for name, members in groups.items()),
            *(["--set", text] for text in assignments),
        ]
        if again == config
        else None
    )


def _yaml(value: Any) -> str:
    """Return a value on one line as --set reads it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _differing(new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings that differ, flat ("training.lr")."""
    found: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key)
        if value == before:
            continue
        if isinstance(value, dict) and isinstance(before, dict) and prefix + key not in _WHOLE:
            found |= _differing(value, before, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
