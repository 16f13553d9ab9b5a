"""What README and docs say exists: commands and their options, Python, links."""

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

from molkd.cli import kd as root  # noqa: TID251

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```", re.MULTILINE)


def blocks(page, *languages):
    """Return (info string, text) of the fenced blocks in one of the languages."""
    found = [(info.strip(), text) for _, info, text in _BLOCK.findall(page.read_text())]
    return [(info, text) for info, text in found if info.split(" ")[0] in languages]


def command_lines(page):
    """Yield the words of every ``kd`` command line, in blocks and in running text."""
    for _, text in blocks(page, "", "bash", "sh", "console", "text"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||;|\|", line.strip().removeprefix("$ ")):
                # The shell puts something in the place of $VARIABLE; every option takes a 1.
                words = [re.sub(r"\$\w+", "1", word) for word in shlex.split(part, comments=True)]
                words = words[1:] if words[:1] in (["do"], ["exec"]) else words
                if words and Path(words[0]).name in ("kd", "molkd"):
                    yield words[1:], True
    running = _BLOCK.sub("", page.read_text())
    for text in re.findall(r"`(kd [^`\n]+)`", running):
        yield shlex.split(text.replace("...", ""))[1:], False


def check(words, *, complete):
    """Follow the words to a command and parse its options; a complete line also has all arguments."""
    group, name = root, "kd"
    if words and words[0] in ("X", "COMMAND"):
        return
    while isinstance(group, click.Group):
        while words and words[0].startswith("--"):  # options of kd itself
            assert any(words[0] in p.opts for p in group.params) or words[0] == "--help", words
            words = words[1:]
        if not words:
            return
        name, words = words[0], words[1:]
        assert name in group.commands, f"no command {name}; there are {', '.join(group.commands)}"
        group = group.commands[name]
    if complete:
        group.make_context(name, list(words))
    else:
        parser = group.make_parser(click.Context(group))
        parser.parse_args([word for word in words if word != "--help"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_command_lines_parse(page):
    for words, complete in command_lines(page):
        try:
            check(words, complete=complete)
        except (click.ClickException, AssertionError) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else error
            pytest.fail(f"{page.name}: kd {shlex.join(words)}: {message}")


def test_readme_shows_every_command():
    readme = ROOT / "README.md"
    shown = {
        " ".join(words[: 2 if words[0] == "cache" else 1]) for words, _ in command_lines(readme) if words
    }
    assert shown >= {
        "ingest", "cache-teacher", "cache info", "cache verify", "train-student", "evaluate", "report",
        "doctor", "demo",
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks(page, tmp_path, monkeypatch):
    """Every block compiles; those marked ``python runnable`` run in turn beside example.kdcache."""
    run_blocks(page, tmp_path, monkeypatch)


def run_blocks(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copytree(ROOT / "tests/data/golden_v1_fitted.kdcache", "example.kdcache")
    names: dict[str, object] = {}
    for info, text in blocks(page, "python"):
        code = compile(text, f"{page.name}", "exec")
        if "runnable" in info.split():
            exec(code, names)
    return names


def test_a_store_is_read_without_molkd(tmp_path, monkeypatch):
    """Section 12 of the format's page gives the values that tests/cache_schema/golden_v1.py stored."""
    page = ROOT / "docs/cache-format.md"
    assert not any("molkd." in text for _, text in blocks(page, "python"))
    names = run_blocks(page, tmp_path, monkeypatch)
    copper, water = names["formulas"].index([29]), names["formulas"].index([8, 1, 1])
    scale = 1025 / 1024
    assert names["features"][copper].values.tolist() == [[1 + 0.5 * 127 * scale, 0.25 * 20 * scale]]
    assert names["features"][water].values.tolist() == [[1 + 0.5 * 127 * scale, 0]] * 3
    row = names["systems"]["row"].values[copper]
    assert names["vectors"][row].tolist() == [[-2 * scale, 127 * scale, 7 * scale], [0] * 3, [0] * 3]


def anchors(page):
    """Return the anchors that headings get: lower case, words joined by hyphens."""
    titles = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = _BLOCK.sub("", page.read_text())
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            problems.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file):
            problems.append(f"{target}: no such heading")
    assert problems == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_in_pages_exist(page):
    """Paths of the tree in running text: ``pipeline/...``, ``docs/...``, ``tests/...``."""
    named = re.findall(r"`((?:pipeline|cache_schema|docs|tests|benchmarks|\.ci)/[\w./-]*)`", page.read_text())
    missing = [
        name for name in named if not (ROOT / name).exists() and not (ROOT / "pipeline" / name).exists()
    ]
    assert missing == []
