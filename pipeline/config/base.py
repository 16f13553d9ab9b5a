"""What all settings share: later wins, an unknown key is an error, and they are written back as YAML."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from molkd.pipeline.errors import ConfigError


class Settings(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Settings)


def make_config(kind: type[S], *layers: Mapping[str, Any]) -> S:
    """Merge layers (later wins, nested mappings merge key by key) and validate.

    Raises
    ------
    ConfigError
        With every problem and, for an unknown key, the nearest valid one.
    """
    try:
        return kind.model_validate(merged(*layers))
    except ValidationError as error:
        problems = [_explain(kind, problem) for problem in error.errors()]
        raise ConfigError("; ".join(problems)) from None


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``a.b=c`` strings into nested mappings; values are read as YAML."""
    layers: list[dict[str, Any]] = []
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {text}: write it as key=value, for example training.lr=1e-3")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {text}: {value!r} cannot be read as a YAML value") from None
        layers.append(nested({key: parsed}))
    return merged(*layers)


def nested(assignments: Mapping[str, Any]) -> dict[str, Any]:
    """Turn keys with dots into nested mappings: ``{"training.lr": 1}`` into ``{"training": {"lr": 1}}``."""
    result: dict[str, Any] = {}
    for key, value in assignments.items():
        inner: Any = number(value) if isinstance(value, str) else value
        for part in reversed(str(key).split(".")):
            inner = {part: inner}
        result = _merge(result, inner)
    return result


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings key by key; later wins."""
    result: dict[str, Any] = {}
    for layer in layers:
        result = _merge(result, layer)
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # a parser's message has several lines
        raise ConfigError(f"{path}: cannot be read as YAML ({reason})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return content


def dump_yaml(config: Settings) -> str:
    """Return the resolved settings as YAML that `read_yaml` and `make_config` turn back into them."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        result[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def number(text: str) -> float | str:
    """Read a number, also one that YAML reads as text, like 1e-3; other text stays as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(kind: type[BaseModel], problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location)
    if problem["type"] != "extra_forbidden":
        message = str(problem["msg"]).removeprefix("Value error, ")
        return f"{where}: {message} (found {problem['input']!r})" if where else message
    valid = _valid_keys(kind, location[:-1])
    nearest = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.0)
    prefix = ".".join(location[:-1] + nearest)
    return f"unknown setting {where}; did you mean {prefix}? valid here: {', '.join(valid)}"


def _valid_keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Return the keys of the settings at `path`, also where they are items of a list or of a mapping."""
    for part in path:
        field = kind.model_fields.get(part)
        kind = next(_inner_settings(field.annotation), kind) if field else kind
    return sorted(kind.model_fields)


def _inner_settings(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _inner_settings(inner)
