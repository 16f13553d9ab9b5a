"""`kd cache plan` and `--dry-run`: the same price, and nothing left behind."""

import json

import pytest
from stage_one_cases import files


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def price_of(kd, *arguments):
    result = kd(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_files_are_priced_without_a_store(kd, everything, here):
    asked = (
        everything / "train.extxyz",
        "--teacher",
        everything / "teacher.safetensors",
        "--signals",
        "node",
    )
    asked += ("--name", "t", "--batch-atoms", "64", "--batch-edges", "999", "--energy-key", "energy")
    planned = price_of(kd, "cache", "plan", *asked)
    assert (planned["store"], planned["n_systems"]) == ("train.kdcache", 60)
    assert set(planned["bytes_to_write"]) == {"structures", "node"}
    dry = price_of(kd, "cache-teacher", *asked, "train.kdcache", "--dry-run")
    assert planned["total_bytes"] == dry["total_bytes"] > 0
    assert files(here) == {}
    assert "beside the teacher" in kd("cache", "plan", *asked).out


def test_a_budget(kd, everything, here):
    asked = (
        everything / "bare.kdcache",
        "--teacher",
        everything / "teacher.safetensors",
        "--signals",
        "all",
    )
    every = price_of(kd, "cache", "plan", *asked, "--encoding", "fp32", "--budget", "1GB")["proposal"]
    assert "--encoding layer/M1=fp32" in every["flags"]
    budget = str(every["total_bytes"] - 1000)
    result = kd("cache", "plan", *asked, "--encoding", "fp32", "--budget", budget)
    assert result.code == 0, result.err
    assert "Within the budget, the store takes" in result.out
    assert files(here) == {}
