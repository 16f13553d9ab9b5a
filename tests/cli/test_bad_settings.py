"""Settings, signals and teachers that do not exist or do not fit: refused before anything runs."""

import re
from pathlib import Path

import numpy as np
import pytest
from cli_arguments import train


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "training.lrr=1"], [r"unknown setting training\.lrr; did you mean training\.lr\?"]),
        (["--set", "trainin.lr=1"], [r"unknown setting trainin; did you mean training\?"]),
        (["--set", "model.hiden_channels=8"], ["hiden_channels", "hidden_channels"]),
        (["--set", "training.lr"], ["--set training.lr: write it as key=value"]),
        (["--set", "training.lr=fast"], ["training.lr", "'fast'"]),
        (["--set", "training.schedule.kind=zigzag"], ["training.schedule.kind", "warmup_exponential"]),
        (["--kd", "n2m=1"], ["'n2n', 'e2n', 'v2v', 'e2e'", "'n2m'"]),
        (["--kd", "n2n:U9"], ["the student has no scalar features U9; did you mean U", "valid taps: M1, "]),
        (["--kd", "n2n:H9->U1"], ["--kd n2n:H9->U1: the teacher gives no layer/H9", "did you mean layer/"]),
        (["--kd", "n2n:H9-"], ["quote what holds ->"]),
        (["--kd", "v2v:U1"], ["no vector features U1; did you mean UV1?", "valid taps: "]),
        (["--kd", "e2e"], ["needs the teacher's signal edge", "--signals edge"]),
        (["--kd", "n2n=-1"], ["kd.0", "positive"]),
        (["--kd", "n2n=much"], ["n2n=much", "a number, auto or balance"]),
        (["--kd", "none", "--kd", "n2n"], ["--kd none cannot be combined"]),
        (["--kd", "n2n", "--kd", "n2n=2"], ["each KD loss can be given once"]),
        (["--kd", "n2n", "--teacher", "other"], ["no teacher other; it has teacher"]),
        (["--epochs", "0"], ["training.max_epochs", "1"]),
        (["--val-fraction", "1.5"], ["val_fraction", "less than 1"]),
        (["--device", "cuda:999"], ["--device cuda:999"]),
        (["--device", "abacus"], ["--device abacus: no such device; take auto, cpu, cuda"]),
        (["--val", "none.xyz"], ["none.xyz does not exist"]),
        (["--test", "none.xyz"], ["none.xyz does not exist"]),
        (["--config", "none.yaml"], ["none.yaml: cannot be read as YAML"]),
    ],
    ids=" ".join,
)
def test_settings(refused, kd, everything, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    command = train(everything / "train.kdcache", tmp_path / "run")
    refused(*command, *arguments, says=says, new=["run"])
    if "none.xyz" in arguments or "other" in arguments:
        assert kd(*command).code == 0  # that run never began, so a corrected command takes its folder


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "training:\n  batchsize: 3\n",
            "unknown setting training.batchsize; did you mean training.batch_size",
        ),
        ("traning: {}\n", "unknown setting traning; did you mean training?"),
        ("training: [1\n", "settings.yaml: cannot be read as YAML"),
        ("- 1\n", "settings.yaml: expected a mapping of settings, found list"),
    ],
)
def test_settings_file(refused, everything, tmp_path, text, says):
    (tmp_path / "settings.yaml").write_text(text)
    command = train(everything / "train.kdcache", tmp_path / "run", "--config", tmp_path / "settings.yaml")
    refused(*command, says=[re.escape(says)])


def test_unknown_preset(refused, everything, tmp_path):
    command = train(everything / "train.kdcache", tmp_path / "run", student="pain-tiny")
    refused(*command, says=[r"unknown preset 'pain-tiny'; did you mean painn-tiny\?", "schnet-tiny"])


def test_run_with_other_settings_is_kept(refused, kd, everything, tmp_path):
    command = train(everything / "train.kdcache", tmp_path / "run")
    assert kd(*command).code == 0
    says = [r"run: holds a run with other settings \(training", "give another --out"]
    refused(*command, "--lr", "0.5", says=says)


def test_student_without_vectors(refused, everything, tmp_path):
    command = ("train-student", everything / "train.kdcache", "--student", "schnet-tiny", "--steps", "2")
    for loss, what in (("v2v", "vector features"), ("e2e", "features of edges")):
        says = [f"--kd {loss} needs {what}, this student has none; take n2n, or a PaiNN or GemNet-OC student"]
        refused(*command, "--kd", f"{loss}=1", "--out", tmp_path / loss, says=says, new=[loss])


def test_signal_that_the_teacher_does_not_give(refused, everything, store):
    teacher = everything / "schnet.safetensors"
    says = [r"schnet\.safetensors: gives no signal v2v", "it has atomic_energies, energy, forces, .*node"]
    refused("cache-teacher", store, "--teacher", teacher, "--signals", "energy,v2v", says=says)
    refused("cache-teacher", store, "--teacher", teacher, "--signals", ",", says=["signals", "at least 1"])


def test_signal_that_the_cache_does_not_hold(refused, kd, everything, tmp_path):
    teacher, store = everything / "schnet.safetensors", tmp_path / "new.kdcache"
    assert kd("cache-teacher", everything / "train.extxyz", store, "--teacher", teacher).code == 0
    says = [
        "--kd n2n:I1->U1 needs the teacher's signal layer/I1",
        "the cache has: .*node",
        "--signals layer/I1",
    ]
    refused(*train(store, tmp_path / "run", "--kd", "n2n:I1->U1"), says=says, new=["run"])
    says = ["--kd v2v: the teacher gives no v2v; it gives atomic_energies, layer/I1, .*node"]
    refused(*train(store, tmp_path / "v2v", "--kd", "v2v=1"), says=says, new=["v2v"])


def test_student_of_no_teacher(refused, everything, tmp_path):
    command = train(everything / "bare.kdcache", tmp_path / "run", "--kd", "n2n=1")
    refused(*command, says=["no teacher in this store", "kd cache-teacher", "--kd none"], new=["run"])


def test_training_without_labels(refused, everything, tmp_path):
    command = train(everything / "bare.kdcache", tmp_path / "run", "--kd", "none")
    says = [r"bare\.kdcache: no system has an energy or forces", "--energy-key", "--pseudo-labels"]
    refused(*command, says=says, new=["run"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none", None, "is no file and no known name; give a molkd model"),
        ("none.npz", None, "none.npz: no such file"),
        ("none.safetensors", None, "none.safetensors: no such model file; give a"),
        ("junk.npz", b"junk", "junk.npz: not a readable .npz file"),
        ("junk.safetensors", b"junk" * 100, "junk.safetensors: not a readable safetensors file"),
        ("junk.pt", b"junk", "junk.pt: truncated, damaged or no file of torch.save"),
        ("weights.h5", b"junk", "is not a kind of file that a teacher comes in; give a molkd model"),
    ],
)
def test_no_teacher(refused, everything, store, tmp_path, monkeypatch, name, content, says):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    refused("cache-teacher", store, "--teacher", name, says=[re.escape(name), re.escape(says)])
    refused("evaluate", name, everything / "train.extxyz", says=[re.escape(name), re.escape(says)])


def test_weights_of_something_else(refused, store, tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, a=np.zeros(3))
    says = [r"other\.npz: not the weights of a schnetpack PaiNN", "give a file"]
    refused("cache-teacher", store, "--teacher", path, says=says)
