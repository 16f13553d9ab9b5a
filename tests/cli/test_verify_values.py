"""`kd cache verify --deep` on the command line: table, JSON, exit codes, flags that do not go together."""

import json

import pytest
from stage_one_cases import write_teacher


def test_table_and_json(kd, everything, store):
    asked = ("cache", "verify", store, "--deep", "--teacher", everything / "teacher.safetensors")
    result = kd(*asked, "--systems", 5)
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if "= recomputed" in line]
    assert len(lines) == 5  # one a signal of the store
    assert all(line.endswith("ok") for line in lines)
    assert "teacher teacher, 5 systems" in result.out
    plain = json.loads(kd(*asked, "--systems", 5, "--json").out)
    assert plain["ok"]
    assert len(plain["systems"]["teacher"]) == 5
    assert {check["what"] for check in plain["checks"]} >= {"v2v = recomputed", "forces = recomputed"}
    assert all(0 < check["used"] <= 1 for check in plain["checks"] if check["unit"] == "1")


def test_damage_has_exit_code_3(kd, store):
    path = next((store / "data.zarr/teachers/teacher/node/values/c").rglob("0*/0"))
    path.write_bytes(path.read_bytes()[:-1])
    result = kd("cache", "verify", store, "--deep")
    assert result.code == 3
    assert "note: values were not looked at: repair the files first" in result.out


def test_another_teacher_is_an_error_of_the_user(kd, store, tmp_path):
    other = write_teacher(tmp_path / "teacher", seed=4)
    result = kd("cache", "verify", store, "--deep", "--teacher", other)
    assert result.code == 1
    assert "none of its teachers has the weights of" in result.err


@pytest.mark.parametrize("flags", [("--deep", "--quick"), ("--teacher", "x.safetensors")])
def test_flags_that_do_not_go_together(kd, store, flags):
    result = kd("cache", "verify", store, *flags)
    assert result.code == 2
    assert "--teacher goes with --deep, and --deep not with --quick" in result.err
