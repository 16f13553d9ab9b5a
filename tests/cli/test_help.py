"""What a user meets first: help with examples that work, without waiting for torch."""

import re
import shlex
import subprocess
import sys

import click
import pytest

from molkd.cli import kd as root  # noqa: TID251


def commands(group=root, path=()):
    """Yield every command with the words that name it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


ALL = dict(commands())


def help_of(path):
    context = click.Context(ALL[path], info_name=" ".join(("kd", *path)), max_content_width=100)
    return ALL[path].get_help(context)


def test_commands_of_the_product():
    assert set(ALL) >= {
        ("ingest",), ("cache-teacher",), ("cache", "info"), ("cache", "verify"), ("train-student",),
        ("evaluate",), ("report",), ("doctor",), ("demo",), ("teacher", "info"),
    }  # fmt: skip


@pytest.mark.parametrize("path", ALL, ids="-".join)
def test_help_has_examples_that_parse(path):
    """Examples stand on lines of their own and use options that exist."""
    lines = help_of(path).splitlines()
    start = next(k for k, line in enumerate(lines) if line.strip() in ("Example:", "Examples:"))
    examples = []
    for line in lines[start + 1 :]:
        if not line.strip():
            break
        examples.append(shlex.split(line))
    assert examples
    for example in examples:
        assert example[: 1 + len(path)] == ["kd", *path]
        ALL[path].make_context(path[-1], example[1 + len(path) :])  # raises on what does not exist


@pytest.mark.parametrize("path", ALL, ids="-".join)
def test_every_option_says_what_it_does(path):
    text = help_of(path)
    assert "--json" in text
    known = {"--seed", "--batch-size", "--device", "--help", "--kd-head", "--kd-loss"}  # their names say it
    for option in (p for p in ALL[path].params if isinstance(p, click.Option)):
        assert option.help or known & set(option.opts), option.name


def test_help_imports_no_torch():
    """In a process where importing a heavy package fails, every help page still shows."""
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torch_geometric", "ase", "zarr", "matplotlib", "pydantic"}:
            raise ImportError(f"{name} imported")
sys.meta_path.insert(0, Refuse())
from molkd.cli import kd
for words in [[], *map(str.split, sys.argv[1:])]:
    kd([*words, "--help"], standalone_mode=False)
"""
    pages = [" ".join(path) for path in ALL]
    done = subprocess.run([sys.executable, "-c", program, *pages], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^Usage: ", done.stdout, re.MULTILINE)) == len(pages) + 1


def test_version(kd):
    result = kd("--version")
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(r"kd, version \d+\.\d+\.\d+\n", result.out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["ingest"],
        ["cache-teacher", "a.kdcache"],
        ["ingest", "a", "b", "--frobnicate"],
        ["evaluate", "run", "data", "--batch-size", "0"],
        ["ingest", "a", "b", "--on-conflict", "guess"],
    ],
    ids=" ".join,
)
def test_usage_errors(kd, arguments):
    result = kd(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage: kd")
    assert "--help" in result.err
    assert "Traceback" not in result.err
