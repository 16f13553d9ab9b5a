"""From names and paths to teachers."""

import subprocess
import sys

import numpy as np
import pytest
from teacher_cases import random_schnetpack_arrays

from molkd.pipeline.errors import ConfigError, ModelError, TeacherError
from molkd.pipeline.teachers.load import available_teachers, load_teacher


@pytest.mark.parametrize("spec", ["sevennet-7", "missing/model.pt"])
def test_an_unknown_teacher_is_told_what_is_possible(spec):
    with pytest.raises(TeacherError) as error:
        load_teacher(spec)
    for part in (spec, ".safetensors", ".npz", "sevennet-0"):
        assert part in str(error.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(TeacherError, match="not a kind of file"):
        load_teacher(str(tmp_path / "model.bin"))


def test_a_folder_without_a_model_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"best\.safetensors"):
        load_teacher(str(tmp_path))


def test_a_device_that_does_not_exist_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", **random_schnetpack_arrays())
    with pytest.raises(ConfigError, match="warp"):
        load_teacher(str(tmp_path / "w.npz"), device="warp")


def test_available_teachers_imports_no_foreign_package():
    code = (
        "import sys; from molkd.pipeline.teachers.load import available_teachers as a; a(); "
        "print(sorted({'sevenn', 'e3nn', 'schnetpack'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_missing_package_is_reported_with_its_remedy(monkeypatch):
    monkeypatch.setattr("molkd.pipeline.teachers.load.find_spec", lambda name: None)
    found = available_teachers()
    assert found["sevennet-0"] == "needs pip install 'molkd[sevenn]'"
    assert found["molkd"] == "installed"


def test_an_unknown_model_is_not_blamed_on_an_option_nobody_gave():
    with pytest.raises(TeacherError, match=r"^nothere: is no file and no known name; give a molkd model"):
        load_teacher("nothere")
