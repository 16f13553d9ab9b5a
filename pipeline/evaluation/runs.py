"""Read run folders as `kd train-student` leaves them."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from molkd.pipeline.config import KDTerm, MixConfig, TrainConfig, make_config
from molkd.pipeline.errors import ConfigError, DataError
from molkd.pipeline.places import short_name

NO_KD = "none"
_IN_KD_NAME = frozenset({"kd", "kd_auto", "pseudo_labels", "teacher"})
# Settings that say where a run goes and how it is watched, not what it computes.
BOOKKEEPING = frozenset(
    {"seed", "out", "label", "device", "tensorboard", "log_every", "cka_systems", "checkpoint_every"}
    | {"test", "test_groups"}
)


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run."""

    path: Path
    student: str
    kd: str  # "none", or the losses as asked, see `kd_setting`
    seed: int
    label: str
    n_parameters: int | None
    seconds: float | None  # of training, wall clock
    val: dict[str, float | None]  # energy_mae_meV, force_mae_meV_A, force_cos, efwt_percent
    test: dict[str, dict[str, float | None]]  # the same by name of the test set
    test_groups: dict[str, tuple[str, ...]]  # names of test sets by the name of the group they form
    settings: dict[str, Any]  # config.yaml, flat ("training.lr"), without what may differ within a group
    config: dict[str, Any]  # config.yaml as it stands
    summary: dict[str, Any]  # metrics.json as it stands
    curves: dict[str, NDArray[np.float64]]  # columns of metrics.csv, NaN where not measured


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises
    ------
    DataError
        If it is no run folder, the run has not finished, or a file in it is damaged.
    """
    path = Path(path)
    config, final = _read_config(path / "config.yaml"), _read_final(path / "metrics.json")
    student = final.get("student") or config.get("student")
    if not student:
        raise DataError(f"{path / 'metrics.json'}: no student is named; was it written by another program?")
    kd = kd_setting(config)
    flat = _flatten({**_with_defaults(config), **mix_setting(config)})
    if kd != NO_KD or not flat["mix"]:
        del flat["mix"]  # named with the losses, or there is none
    return Run(
        path=path,
        student=str(student),
        kd=kd,
        seed=int(final.get("seed", config.get("seed", 0))),
        label=str(final.get("label") or ""),
        n_parameters=final.get("n_parameters"),
        seconds=final.get("seconds"),
        val=dict(final.get("val") or {}),
        test={name: dict(values) for name, values in (final.get("test") or {}).items()},
        test_groups={name: tuple(sets) for name, sets in (config.get("test_groups") or {}).items()},
        settings={
            key: value
            for key, value in flat.items()
            if key.partition(".")[0] not in BOOKKEEPING | _IN_KD_NAME
        },
        config=config,
        summary=final,
        curves=read_curves(path / "metrics.csv"),
    )


def read_curves(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read metrics.csv into one array per column, NaN for empty cells.

    A last line that an interrupted run left half-written is dropped; of a step that a resumed run wrote again
    the last row counts. Without the file, or without rows, the result is empty.

    Raises
    ------
    DataError
        If a line in the middle is damaged; file and line are named.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        lines.pop()  # even if it looks whole: 12.3 may be the beginning of 12.34
    rows = list(csv.reader(lines))
    if not rows:
        return {}
    header, by_step = rows[0], {}
    if "step" not in header:
        raise DataError(
            f"{path}: the first line names no column `step`; this is not the metrics.csv of a run"
        )
    for number, row in enumerate(rows[1:], start=2):
        try:
            values = dict(zip(header, (float(cell) if cell else np.nan for cell in row), strict=True))
        except ValueError:
            raise DataError(
                f"{path}: line {number} is damaged (expected {len(header)} numbers); remove the line"
            ) from None
        by_step[values["step"]] = values
    table = [by_step[step] for step in sorted(by_step)]
    return {name: np.array([row[name] for row in table]) for name in header}


def kd_setting(config: Mapping[str, Any]) -> str:
    """Name the distillation of a config: "none", or for example "n2n=auto,loss=mae + v2v=1 from painn".

    Stores mixed in belong to the name, as the teacher labelled them: "grad=3 + 0.5 of rattled". Without a
    teacher they are a setting like others.
    """
    terms = [make_config(KDTerm, term).text for term in config.get("kd") or ()]
    if config.get("pseudo_labels"):
        terms.append("pseudo-labels")
    if not terms:
        return NO_KD
    mix = mix_setting(config)["mix"]
    source = f" from {config['teacher']}" if config.get("teacher") else ""
    return " + ".join([*sorted(terms), *([mix] if mix else [])]) + source


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the settings that its version did not know yet; a later one's as it stands."""
    try:
        return make_config(TrainConfig, config).model_dump(mode="json")
    except ConfigError:
        return dict(config)


def mix_setting(config: Mapping[str, Any]) -> dict[str, str]:
    """Name the further stores of a config, wherever they lie: {"mix": "0.25 of rattled (weight 0.5)"}."""
    return {"mix": " + ".join(_mixed(make_config(MixConfig, mix)) for mix in config.get("mix") or ())}


def _mixed(mix: MixConfig) -> str:
    weight = "" if mix.weight == 1 else f" (weight {mix.weight:g})"
    return f"{mix.share:g} of {short_name(mix.store)}{weight}"


def term_label(term: Mapping[str, Any]) -> str:
    """Return a term of a config as it is written on the command line, without its weight."""
    return make_config(KDTerm, term).label


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    parts = (_flatten(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: inner for part in parts for key, inner in part.items()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent}: no config.yaml inside; give the --out folder of `kd train-student`"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({error}); run the training again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return content


def _read_final(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent}: no metrics.json, the run has not finished; give its command again to continue it"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path}: damaged ({error}); give the command of the run again to write it anew"
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object, found {type(content).__name__}")
    return content
