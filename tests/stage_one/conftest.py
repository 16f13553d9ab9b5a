"""Makes helper modules importable under import-mode importlib, and small stores and teachers, made once."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "teachers")]

N_SYSTEMS = 320  # two shards of 1,024 atoms


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with train.extxyz, its store and a teacher; nobody changes it."""
    from stage_one_cases import make_store, structures, write_extxyz, write_teacher

    folder = tmp_path_factory.mktemp("made")
    data = write_extxyz(folder / "train.extxyz", structures(N_SYSTEMS))
    make_store(folder / "train.kdcache", data)
    write_teacher(folder / "teacher")
    return folder


@pytest.fixture
def store(made, tmp_path):
    """A store of its own for this test."""
    return shutil.copytree(made / "train.kdcache", tmp_path / "train.kdcache")


@pytest.fixture(scope="session")
def teacher_file(made):
    """A direct-force PaiNN with random weights."""
    return made / "teacher.safetensors"


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """A folder with a store of many small shards, bare and filled by one process; nobody changes it."""
    from distributed_cases import make_many

    folder = tmp_path_factory.mktemp("many")
    make_many(folder)
    return folder


@pytest.fixture
def bare(many, tmp_path):
    """The bare store of many shards, of its own for this test."""
    return shutil.copytree(many / "bare.kdcache", tmp_path / "train.kdcache")


@pytest.fixture
def teacher(many):
    """The teacher that filled the store of many shards."""
    return many / "teacher.safetensors"
