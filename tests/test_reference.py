"""Tables of the manual that are made from code: they name everything there is, and say what the code says."""

import ast
import re
import runpy
import sys
from pathlib import Path

import click
import pytest
import yaml

from molkd.cache_schema.fields import ATOM_FIELDS, EDGE_INDEX, EDGE_SHIFT, N_EDGES, SYSTEM_FIELDS
from molkd.cli import kd as root  # noqa: TID251
from molkd.pipeline.models.registry import MODELS, build_model, preset_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def reference():
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        import reference

        yield reference
    finally:
        sys.path.remove(str(DOCS / "_ext"))


@pytest.fixture(scope="module")
def settings(reference):
    return reference.settings()


def classes_of_settings():
    """Return class -> names of its fields, by reading the sources: bases lead to Settings."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                names = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
                found[node.name] = (bases, names)
    known = {"Settings"}
    while more := {name for name, (bases, _) in found.items() if known & set(bases)} - known:
        known |= more
    return {name: names for name, (_, names) in found.items() if name in known - {"Settings"}}


def test_every_setting_has_a_row(settings):
    rows = re.findall(r"^\| `([\w.\[\]]+)` \|", settings, re.MULTILINE)
    last = {key.rpartition(".")[2] for key in rows}
    wanted = classes_of_settings()
    assert len(wanted) > 8
    assert {"store", "share", "weight", "teacher"} == set(wanted["MixConfig"])
    missing = [f"{kind}.{name}" for kind, names in wanted.items() for name in names if name not in last]
    assert missing == []


def row(settings, section, key):
    """Return the cells of a setting's row behind its name."""
    inside = settings.partition(f"## {section}\n")[2].partition("\n## ")[0]
    line = next(line for line in inside.splitlines() if line.startswith(f"| `{key}` |"))
    return [cell.strip() for cell in line.split(" | ")][1:]


def test_settings_say_what_the_code_says(settings):
    assert row(settings, "TrainConfig", "training.lr")[:2] == ["number, > 0", "`0.001`"]
    assert row(settings, "TrainConfig", "training.forces_weight")[2].startswith("a_F of Eq. 1")
    assert row(settings, "TrainConfig", "mix[].share")[0] == "number, > 0, < 1"
    assert row(settings, "TrainConfig", "kd[].head")[0] == "`identity` or `linear` or `mlp`"
    assert row(settings, "TrainConfig", "amp")[1] == "`'off'`"  # off without quotes is false in YAML
    assert row(settings, "TrainConfig", "store")[:2] == ["path or URL", "required"]
    assert row(settings, "TrainConfig", "training.references")[0] == (
        "`fit` or `none` or mapping of whole number to number"
    )
    # A comment above a field, of several lines, and one behind the last line of a field that has several.
    assert row(settings, "TrainConfig", "kd[].weight")[2].startswith("lambda; ")
    assert "balance" in row(settings, "TrainConfig", "kd[].weight")[2]
    assert row(settings, "IngestConfig", "drop_labels")[2].startswith("more structures")


def test_every_default_is_yaml_that_gives_the_default(reference):
    for kind in reference.settings_classes():
        for name, field in kind.model_fields.items():
            shown = reference._default(field)
            if shown in ("required", ""):
                continue
            value = field.get_default(call_default_factory=True)
            plain = list(value) if isinstance(value, tuple) else value
            assert yaml.safe_load(shown.strip("`")) == plain, (kind, name)


def commands_below(group, name):
    for part, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands_below(command, f"{name} {part}")
        else:
            yield f"{name} {part}"


def test_every_command_has_a_row(reference):
    table = reference.commands()
    wanted = list(commands_below(root, "kd"))
    assert {"kd cache info", "kd train-student"} <= set(wanted)
    assert [name for name in wanted if f"| `{name}` | " not in table] == []
    assert not re.search(r"\| *\|$", table, re.MULTILINE)  # each says what it does


def test_every_preset_is_shown(reference):
    shown = set(re.findall(r"^## (\S+)$", reference.presets(), re.MULTILINE))
    assert {name for name in preset_names() if name in shown or f"{name}-oc20" in shown} == set(
        preset_names()
    )


@pytest.mark.parametrize("preset", ["painn-tiny", "schnet-tiny", "gemnet-oc-tiny"])
def test_signals_are_those_of_models_with_weights(reference, preset):
    """The table makes no weights; a real model gives the same."""
    config = yaml.safe_load((ROOT / f"pipeline/models/presets/{preset}.yaml").read_text())["model"]
    without_weights = reference._signals_of(preset)
    with_weights = build_model(config).signals
    assert {n: (s.axis, s.shape, s.symmetry) for n, s in without_weights.items()} == {
        n: (s.axis, s.shape, s.symmetry) for n, s in with_weights.items()
    }


def test_every_signal_is_named(reference):
    table = reference.signals()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", table, re.MULTILINE | re.DOTALL))
    assert set(sections) == {kind.__name__ for kind in MODELS.values()}
    assert "| `layer/MV1` to `layer/MV6` | atom | (3, C) | 1 | vector |" in sections["PaiNN"]
    assert "| `v2v` " not in sections["SchNet"]
    assert re.search(r"\| `e2n` \| atom .* \| 512 \| 256 \|", sections["GemNetOC"])


def test_pages_hold_every_table(reference):
    pages = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert sorted(reference.MARKER.findall(pages)) == sorted(reference.TABLES)


def test_conf_fills_pages(reference):
    handlers = {}

    class App:
        def connect(self, event, handler):
            handlers[event] = handler

    runpy.run_path(str(DOCS / "conf.py"))["setup"](App())
    source = ["before <!-- reference: arrays --> behind"]
    handlers["source-read"](None, "page", source)
    assert source[0].startswith("before | array |")
    assert source[0].endswith("| behind")


def test_format_page_has_the_arrays_of_the_code():
    """The tables of docs/cache-format.md are written for people; types and shapes have to be the code's."""
    text = (DOCS / "cache-format.md").read_text()
    for spec in (*SYSTEM_FIELDS.values(), *ATOM_FIELDS.values()):
        assert f"| `{spec.name}` | {spec.dtype}{shape(spec)} |" in text
    for spec in (EDGE_INDEX, EDGE_SHIFT, N_EDGES):
        assert f"| `{spec.name}` | {spec.axis} | {spec.dtype}{shape(spec)} |" in text


def shape(spec):
    return f" ({', '.join(map(str, spec.shape))})" if spec.shape else ""
