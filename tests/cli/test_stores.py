"""Remedies that messages about stores give, taken at their word, and what is shown meanwhile."""

import os
import pty
import subprocess
import sys
import termios

import numpy as np
import pytest
import torch
from stage_one_cases import make_store, structures, write_extxyz, write_teacher

from molkd.cache_schema.reader import Cache
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.models.potential import Potential


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def loud_teacher(teacher, tmp_path_factory):
    """The teacher with embeddings so large that its features leave half precision, and nothing else."""
    potential = Potential.load(teacher)
    with torch.no_grad():
        potential.model.get_submodule("atom_emb").embeddings.weight.mul_(1e6)
    path = tmp_path_factory.mktemp("loud") / "loud.safetensors"
    potential.save(path)
    return path


@pytest.fixture
def store(teacher, tmp_path):
    store = make_store(tmp_path / "a.kdcache", write_extxyz(tmp_path / "a.extxyz", structures(40)))
    cache_teacher(CacheConfig(store=store, teacher=str(teacher), signals=("energy", "node")))
    return store


def test_features_beyond_half_precision(kd, refused, loud_teacher, store):
    """The command of the refusal with the option that it names."""
    command = ("cache-teacher", store, "--teacher", loud_teacher, "--signals", "energy,node")
    refused(*command, says=["too large for its encoding", "--encoding fp32"], new=[store.name])
    unfinished = kd("cache", "info", store)
    assert "UNFINISHED" in unfinished.out
    assert "shards missing" in unfinished.out
    assert kd("cache", "verify", store).code == 0
    done = kd(*command, "--encoding", "fp32")
    assert done.code == 0, done.err
    assert kd("cache", "verify", store).code == 0
    assert "UNFINISHED" not in kd("cache", "info", store).out
    with Cache.open(store, complete=True) as cache:
        assert cache.teachers["loud"].signals["node"].encoding == "fp32"
        stored = cache.read(np.arange(4), (), teacher="loud", signals=("node",))["teacher/node"]
        assert np.isfinite(stored).all()
        assert np.abs(stored).max() > np.finfo(np.float16).max
    # What is finished is kept: half precision would lose it.
    says = ["is stored as fp32", "asked for fp16", "1 of its 1 shards are finished", "--name"]
    refused(*command, "--encoding", "fp16", says=says)
    assert kd(*command, "--json").code == 0  # nothing asked, nothing to do


def test_overflow_behind_finished_shards(kd, refused, teacher, store):
    """A signal that is finished under this name goes beside it under another."""
    command = ("cache-teacher", store, "--teacher", teacher, "--signals", "node", "--encoding", "fp32")
    refused(*command, says=["is stored as fp16", r"another name \(--name\)"])
    assert kd(*command, "--name", "exact").code == 0
    with Cache.open(store, complete=True) as cache:
        assert {t: s.signals["node"].encoding for t, s in cache.teachers.items()} == {
            "teacher": "fp16",
            "exact": "fp32",
        }


def test_verify_shows_progress_on_a_terminal_only(kd, store):
    assert kd("cache", "verify", store).err == ""
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    command = [sys.executable, "-c", "from molkd.cli import main; main()", "cache", "verify", str(store)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=True)
    os.close(stderr)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert done.stdout.startswith("ok: ")
    assert "verify" in shown
    assert "100%" in shown
