"""The command line in this process, and a folder with one of everything: data, store, teachers, a run."""

import logging
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(_TESTS / "stage_one"), str(_TESTS / "teachers")]

SIGNALS = ("energy", "forces", "atomic_energies", "node", "v2v")


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def kd(capsys, monkeypatch):
    """Run a command as the script does and return exit code, stdout and stderr."""
    from molkd.cli import main  # noqa: TID251

    level = logging.getLogger("molkd").level

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["kd", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    yield run
    logging.getLogger("molkd").setLevel(level)


@pytest.fixture
def refused(kd, tmp_path):
    """Check that a command fails with one line that holds all given texts, and loses nothing on disk."""
    from stage_one_cases import files

    def check(*arguments, says, code=1, new=()):
        before = files(tmp_path)
        result = kd(*arguments)
        assert result.code == code, result.out + result.err
        assert result.out == ""
        assert result.err.startswith("error: "), result.err
        assert result.err.count("\n") == 1, result.err
        for text in says:
            assert re.search(text, result.err), f"{text!r} is not in {result.err!r}"
        after = files(tmp_path)
        assert after.items() >= before.items()
        assert {Path(name).parts[0] for name in after.keys() - before.keys()} <= set(new)
        assert not [name for name in after if ".tmp-" in name]

    return check


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """One of everything; nobody changes it.

    train.extxyz, test.extxyz, bare.extxyz (no labels), strange.extxyz (system 3 holds nitrogen);
    train.kdcache with the signals of teacher.safetensors, bare.kdcache; schnet.safetensors, ethanol.npz; run/
    of a painn-tiny.
    """
    from stage_one_cases import make_store, structures, write_extxyz, write_teacher

    from molkd.pipeline.caching import cache_teacher
    from molkd.pipeline.config import CacheConfig
    from molkd.pipeline.distill.settings import resolve
    from molkd.pipeline.distill.train import train_student

    folder = tmp_path_factory.mktemp("everything")
    strange = structures(6)
    strange[3].numbers[0] = 7
    write_extxyz(folder / "strange.extxyz", strange)
    bare = write_extxyz(folder / "bare.extxyz", structures(10, labelled=False))
    make_store(folder / "bare.kdcache", bare)
    data = write_extxyz(folder / "train.extxyz", structures(60))
    test = write_extxyz(folder / "test.extxyz", structures(12, seed=5))
    store = make_store(folder / "train.kdcache", data)
    teacher = write_teacher(folder / "teacher")
    cache_teacher(CacheConfig(store=store, teacher=str(teacher), signals=SIGNALS))
    write_teacher(folder / "schnet", "schnet")
    write_teacher(folder / "ethanol", "schnetpack")
    settings = ["model.hidden_channels=8", "model.num_layers=1"]
    flags = {"store": store, "out": folder / "run", "student": "painn-tiny", "steps": 3, "batch_size": 4}
    train_student(resolve(None, settings, flags | {"kd_terms": ("n2n=auto",), "test": (test,)}))
    return folder


@pytest.fixture
def store(everything, tmp_path):
    """A store with a teacher's signals, of its own for this test."""
    return shutil.copytree(everything / "train.kdcache", tmp_path / "train.kdcache")
