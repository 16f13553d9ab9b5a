"""Makes helper modules importable under import-mode importlib; small teachers and data, made once."""

import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(_TESTS / "stage_one"), str(_TESTS / "teachers")]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with teachers of random weights and molecules.extxyz; nobody changes it."""
    from augment_cases import write_files

    folder = tmp_path_factory.mktemp("augment")
    write_files(folder)
    return folder
