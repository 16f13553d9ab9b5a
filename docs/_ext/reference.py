"""Tables of the manual that are made from code: commands, settings, presets, signals, arrays of a store.

A page holds `<!-- reference: NAME -->` where the table NAME of `TABLES` belongs; `fill` puts it there, and
`conf.py` calls that when the manual is built. Nothing here needs Sphinx.
"""

import ast
import importlib
import inspect
import io
import pkgutil
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import torch
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import molkd.pipeline
import molkd.pipeline.config
from molkd.cache_schema.fields import (
    ATOM_FIELDS,
    EDGE_INDEX,
    EDGE_SHIFT,
    N_EDGES,
    SYSTEM_FIELDS,
    FieldSpec,
)
from molkd.cli import kd  # noqa: TID251, the manual describes it
from molkd.pipeline.config import Settings
from molkd.pipeline.models import registry
from molkd.pipeline.teachers.taps import places

MARKER = re.compile(r"<!-- reference: (\w+) -->")
_SIMPLE: dict[Any, str] = {
    NoneType: "null",
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    Any: "anything",
}
_LIMITS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "multiple_of": "multiple of {}"}
_YAML_END = "\n...\n"  # PyYAML's, behind a value that is no mapping or list
_PRESETS = Path(registry.__file__).parent / "presets"


def fill(page: str) -> str:
    """Return the text of a page with its tables.

    Raises
    ------
    KeyError
        If there is no table of a name.
    """
    return MARKER.sub(lambda marker: TABLES[marker[1]](), page)


# ---------------------------------------------------------------- commands


def commands() -> str:
    """Return every command with the first sentence of its help."""
    rows = [(f"`{name}`", command.get_short_help_str(limit=200)) for name, command in _commands("kd", kd)]
    return _table(("command", "what it does"), rows)


def _commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for part, inner in command.commands.items():
        yield from _commands(f"{name} {part}", inner)


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """A row of a table of settings."""

    key: str  # with dots, as --set takes it; [] stands for an item of a list
    type: str
    default: str
    meaning: str


def settings() -> str:
    """Return a section for every class of settings that is no part of another one, or that a command has."""
    classes = settings_classes()
    inner = {part for kind in classes for field in kind.model_fields.values() for part in _parts(field)}
    inner |= {
        kind for kind in classes if kind.__subclasses__()
    }  # what several share stands with each of them
    alone = [kind for kind in classes if kind not in inner or _has_command(kind)]
    return "\n\n".join(_settings_section(kind) for kind in alone)


def settings_classes() -> list[type[BaseModel]]:
    """Return every class of settings of the package, by name."""
    for module in pkgutil.walk_packages(molkd.pipeline.__path__, "molkd.pipeline."):
        importlib.import_module(module.name)
    found, rest = set(), list[type[BaseModel]](Settings.__subclasses__())
    while rest:
        kind = rest.pop()
        rest += kind.__subclasses__()
        if kind.__module__.startswith("molkd."):
            found.add(kind)
    return sorted(found, key=lambda kind: kind.__name__)


def setting_rows(kind: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a class, those of its parts behind their own."""
    said = _comments(kind)
    for name, field in kind.model_fields.items():
        meaning = ". ".join(text for text in (field.description, said.get(name)) if text)
        parts = _parts(field)
        if not meaning and parts:
            meaning = _first_line(next(iter(parts)))
        yield Setting(prefix + name, _describe_field(field), _default(field), meaning)
        for part, place in parts.items():
            if not _has_command(part):  # else it has a section of its own
                yield from setting_rows(part, f"{prefix}{name}{place}.")


def _has_command(kind: type[BaseModel]) -> bool:
    return _first_line(kind).startswith("`kd ")


def _settings_section(kind: type[BaseModel]) -> str:
    flags = _help_of_flags(kind)
    rows = [
        (f"`{row.key}`", row.type, row.default, row.meaning or flags.get(row.key.rpartition(".")[2], ""))
        for row in setting_rows(kind)
    ]
    short = hasattr(molkd.pipeline.config, kind.__name__)
    where = f"`from {'molkd.pipeline.config' if short else kind.__module__} import {kind.__name__}`"
    table = _table(("setting", "type", "default", "meaning"), rows)
    return f"## {kind.__name__}\n\n{_first_line(kind)} {where}\n\n{table}"


def _help_of_flags(kind: type[BaseModel]) -> dict[str, str]:
    """Return what a command's help says of its flags; settings without a comment have one of that name."""
    if not _has_command(kind):
        return {}
    command: click.Command = kd
    for word in _first_line(kind).split("`")[1].split()[1:]:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return {str(flag.name): str(getattr(flag, "help", None) or "") for flag in command.params}


def _comments(kind: type[BaseModel]) -> dict[str, str]:
    """Return what comments say of each field: those straight above it, then those on its own lines."""
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not (issubclass(base, Settings) and base is not Settings):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        alone = {row for row in comments if source.splitlines()[row - 1].lstrip().startswith("#")}
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [comments[row] for row in range(first, (node.end_lineno or first) + 1) if row in comments]
            said[node.target.id] = " ".join(lines).rstrip(":") or said.get(node.target.id, "")
    return said


def _parts(field: FieldInfo) -> dict[type[BaseModel], str]:
    """Return the classes of settings that a field holds, and how: [] in a list, .NAME in a mapping."""

    def inside(annotation: Any, place: str) -> Iterator[tuple[type[BaseModel], str]]:
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            yield annotation, place
        place += {tuple: "[]", list: "[]", dict: ".NAME"}.get(get_origin(annotation), "")
        for inner in get_args(annotation):
            yield from inside(inner, place)

    return dict(inside(field.annotation, ""))


def _describe_field(field: FieldInfo) -> str:
    limits = [_LIMITS[key].format(value) for key, value in _limits(field).items()]
    return ", ".join([_describe(field.annotation), *limits])


def _limits(field: FieldInfo) -> dict[str, Any]:
    return {key: getattr(m, key) for m in field.metadata for key in _LIMITS if hasattr(m, key)}


def _describe(annotation: Any) -> str:
    """Say in words what a setting may be."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(inner[0])
    if origin in (Union, UnionType):
        if set(inner) == {Path, str}:
            return "path or URL"
        return " or ".join(_describe(part) for part in inner)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"[{', '.join(_describe(part) for part in inner)}]"
    if origin in (tuple, list):
        return f"list of {_describe(inner[0])}"
    if origin in (dict, Mapping):
        return f"mapping of {_describe(inner[0])} to {_describe(inner[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"`{annotation.__name__}`" if _has_command(annotation) else "settings, see below"
    return _SIMPLE.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    value = list(value) if isinstance(value, tuple) else value
    value = str(value) if isinstance(value, Path) else value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f"`{text.removesuffix(_YAML_END).strip()}`"


def _first_line(kind: type[BaseModel]) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


# ---------------------------------------------------------------- presets


def presets() -> str:
    """Return the file of every preset, comments and all."""
    files = sorted(_PRESETS.glob("*.yaml"))
    return "\n\n".join(f"## {file.stem}\n\n```yaml\n{file.read_text().rstrip()}\n```" for file in files)


# ---------------------------------------------------------------- signals and arrays


def signals() -> str:
    """Return what each architecture gives, with the widths of the paper's presets for OC20 and COLL."""
    sections = []
    for name in registry.MODELS:
        of_preset = {preset: _signals_of(preset) for preset in _paper_presets(name)}
        first = next(iter(of_preset.values()))
        rows = [_signal_row(group, of_preset) for group in _alike(first)]
        columns = ("signal", "axis", "shape", "unit", "symmetry", "where it is taken", *of_preset)
        sections.append(f"## {registry.MODELS[name].__name__}\n\n{_table(columns, rows)}")
    return "\n\n".join(sections)


def _paper_presets(architecture: str) -> list[str]:
    """Return the presets of an architecture for OC20 and COLL, the first of them the one with most layers."""
    names = [
        path.stem for path in sorted(_PRESETS.glob("*-oc20.yaml")) + sorted(_PRESETS.glob("*-coll.yaml"))
    ]
    chosen = [n for n in names if _model(n)["name"] == architecture]
    return sorted(chosen, key=lambda n: -len(_signals_of(n)))


def _model(preset: str) -> dict[str, Any]:
    model: dict[str, Any] = yaml.safe_load((_PRESETS / f"{preset}.yaml").read_text())["model"]
    return model


def _signals_of(preset: str) -> dict[str, FieldSpec]:
    """Return the signals of a preset; `signals` reads the settings only, so no weights are made."""
    kind = registry.MODELS[_model(preset)["name"]]
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.config = kind.config_class.model_validate(_model(preset))
    for rule in ("neighbor_rule", "edge_rule"):
        setattr(model, rule, getattr(model.config, rule, _NoLimit()))
    found: dict[str, FieldSpec] = model.signals
    return found


class _NoLimit:
    max_edges_per_atom = None  # of the format's record of an edge signal; no part of the table


def _alike(signals: Mapping[str, FieldSpec]) -> Iterator[list[FieldSpec]]:
    """Put layers that differ in their number only into one group."""

    def family(spec: FieldSpec) -> str:
        return spec.name.rstrip("0123456789") if spec.name.startswith("layer/") else spec.name

    layers = (s for s in signals.values() if s.name.startswith("layer/"))
    ordered = [s for s in signals.values() if not s.name.startswith("layer/")] + sorted(layers, key=family)
    for _, group in groupby(ordered, family):
        yield list(group)


def _signal_row(group: list[FieldSpec], of_preset: Mapping[str, Mapping[str, FieldSpec]]) -> tuple[str, ...]:
    spec = group[0]
    name = f"`{spec.name}`" if len(group) == 1 else f"`{spec.name}` to `{group[-1].name}`"
    architecture = registry.MODELS[_model(next(iter(of_preset)))["name"]].__name__
    said = places(architecture, [s.name for s in group])
    where = said.get(group[-1].name, "")
    if len(group) > 1:
        where = re.sub(r"\d+$", "of that number", where)
        if re.sub(r"\d+$", "of that number", said[spec.name]) != where:
            where = f"{where}; {spec.name}: {said[spec.name]}"
    widths = [str(s[spec.name].shape[-1]) if s[spec.name].unit == "1" else "" for s in of_preset.values()]
    shape = _shape((*spec.shape[:-1], "C") if spec.unit == "1" else spec.shape)
    return (name, spec.axis, shape, spec.unit, spec.symmetry, where, *widths)


def arrays() -> str:
    """Return what a store of structures and labels holds, and what tells which edges a signal is on."""
    specs = [*SYSTEM_FIELDS.values(), *ATOM_FIELDS.values(), EDGE_INDEX, EDGE_SHIFT, N_EDGES]
    rows = [(f"`{s.name}`", s.axis, _shape(s.shape), s.dtype, s.unit, s.symmetry) for s in specs]
    return _table(("array", "axis", "shape of a row", "type", "unit", "symmetry"), rows)


def _shape(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


TABLES = {
    "commands": commands,
    "settings": settings,
    "presets": presets,
    "signals": signals,
    "arrays": arrays,
}
