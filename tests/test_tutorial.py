"""docs/tutorial.md from the first command to the last, on a part of the data and with few steps."""

import logging
import lzma
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from molkd.cli import kd  # noqa: TID251

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tutorial.md"
# What the page exports in its first block, and what it is here.
SHORTER = {"STEPS": "4", "SHORT": "3", "TEACHER_STEPS": "2", "SEEDS": "0 1"}
SYSTEMS = {"train": 48, "test": 8, "test_new_molecules": 6}

# In place of the script `kd`: bash expands loops and variables of a block, then the calls are made in this
# process, which imports torch once. So no line of a block may need what a `kd` of the same block makes.
RECORDER = """
kd() { printf '%s\\0' "$@" >> "$CALLS"; printf 'END\\0' >> "$CALLS"; }
"""


def blocks(text):
    """Return (language and what follows it, content) of the blocks that are run."""
    return re.findall(r"^```((?:bash|python)[^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def first_systems(text, n):
    lines, end = text.splitlines(keepends=True), 0
    for _ in range(n):
        end += int(lines[end]) + 2
    return "".join(lines[:end])


@pytest.fixture
def clone(tmp_path):
    """What the tutorial takes from a clone, with the first systems of each file only."""
    demo = tmp_path / "pipeline/demo"
    demo.mkdir(parents=True)
    for name, n in SYSTEMS.items():
        with lzma.open(ROOT / f"pipeline/demo/{name}.extxyz.xz", "rt") as file:
            text = file.read()
        with lzma.open(demo / f"{name}.extxyz.xz", "wt") as file:
            file.write(first_systems(text, n))
    shutil.copy(ROOT / "pipeline/demo/painn-coll-gfn2.safetensors", demo)
    return tmp_path


class Shell:
    """Runs bash blocks one after the other; folder and exported variables stay."""

    def __init__(self, folder, calls):
        self.folder, self.calls, self.exports = folder, calls, ""

    def run(self, block):
        """Run a block and return the arguments of every `kd` in it."""
        self.calls.write_text("")
        ending = "\nexport -p > $CALLS.exports; pwd > $CALLS.folder\n"
        subprocess.run(
            [
                "bash",
                "-euo",
                "pipefail",
                "-c",
                f"{self.exports}\nCALLS={self.calls}\n{RECORDER}{block}{ending}",
            ],
            cwd=self.folder,
            check=True,
        )
        self.exports = Path(f"{self.calls}.exports").read_text()
        self.folder = Path(Path(f"{self.calls}.folder").read_text().strip())
        found: list[list[str]] = [[]]
        for word in self.calls.read_text().split("\0")[:-1]:
            if word == "END":
                found.append([])
            else:
                found[-1].append(word)
        return found[:-1]


@pytest.fixture
def quiet_afterwards():
    """Take away what the command line adds to logging."""
    root, package = logging.getLogger(), logging.getLogger("molkd")
    handlers, level = root.handlers[:], package.level
    yield
    root.handlers[:] = handlers
    package.setLevel(level)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_afterwards")
def test_tutorial(clone, monkeypatch, tmp_path):
    shell, names, made = Shell(clone, tmp_path / "calls"), {}, []
    for number, (info, text) in enumerate(blocks(PAGE.read_text())):
        if info.startswith("python"):
            assert info == "python tutorial"
            exec(compile(text, "docs/tutorial.md", "exec"), names)
            continue
        for arguments in shell.run(text):
            kd(arguments, prog_name="kd", standalone_mode=False)
            made.append(arguments[0])
        monkeypatch.chdir(shell.folder)
        if number == 0:
            assert all(f'declare -x {name}="' in shell.exports for name in SHORTER)
            shell.exports += "".join(f'export {name}="{value}"\n' for name, value in SHORTER.items())
    n_seeds = len(SHORTER["SEEDS"].split())
    assert made.count("train-student") == 1 + 2 * n_seeds + 4
    assert (shell.folder / "report/report.html").stat().st_size > 10_000
    assert (shell.folder / "cka-teacher/cka.png").is_file()
    assert "Units and energy reference" in (shell.folder / "runs/kd-0/card.md").read_text()
