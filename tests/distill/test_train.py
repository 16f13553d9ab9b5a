"""Whole runs of seconds: they learn, say what they do, and refuse what makes no sense."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from distill_cases import (
    MODELS,
    PAINN,
    column,
    flip_a_bit,
    read_metrics,
    read_summary,
    read_systems,
    run_cli,
    scale_of,
    train_config,
    write_part,
)
from safetensors.torch import load_file

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import parse_kd
from molkd.pipeline.data.splits import split_mask
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import ConfigError, IntegrityError, ModelError
from molkd.pipeline.evaluation.evaluate import evaluate
from molkd.pipeline.evaluation.runs import read_run
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model

BF16_NOISE = 0.02  # relative, of a loss over 64 atoms; bfloat16 keeps 8 bits
PRINTED = 1e-6  # relative; metrics.csv keeps 8 digits


def zero_loss(systems, scale) -> float:
    """L_0 of a model that predicts zero, one number after the other."""
    energies, lengths = [], []
    for s in systems:
        reference = scale.energy_mean + sum(scale.references[int(z)] for z in s.atomic_numbers)
        energies.append(abs(s.energy - reference) / scale.energy_std)
        lengths += np.linalg.norm(s.forces / scale.forces_std, axis=1).tolist()
    return float(np.mean(energies) + 100 * np.mean(lengths))


@pytest.mark.parametrize("name", MODELS)
def test_students_learn(store, tmp_path, name):
    """A few systems by heart, far better than a model that predicts zero."""
    config = train_config(
        store,
        tmp_path,
        model=MODELS[name],
        training={"max_steps": 100, "lr": 0.02, "schedule": {"kind": "constant"}},
        val_fraction=0.85,
        val_every=100,
    )
    summary = train_student(config)
    ids = Cache.open(store).ids
    train = {row.tobytes() for row in ids[~split_mask(ids, 0.85)]}
    systems = [s for s in read_systems() if s.id in train]
    start = zero_loss(systems, scale_of(systems))
    loss = column(tmp_path, "train_loss")
    assert loss[0] > 0.8 * start
    assert np.mean(loss[-6:]) < 0.4 * start
    assert summary.finished
    assert summary.steps == len(loss) == 100
    assert summary.n_parameters == sum(p.numel() for p in build_model(MODELS[name]).parameters())


def test_terms_are_learned_and_logged_unweighted_beside_the_total(store, tmp_path):
    kd = [
        {"name": "n2n", "weight": 10.0, "head": "mlp"},
        {"name": "n2n", "weight": 2.0, "loss": "huber", "delta": 0.5},
        {"name": "v2v", "weight": 20.0},
        {"name": "v2v", "weight": 2.0, "student_taps": ["UV1", "MV2"]},
        {"name": "vanilla1", "weight": 0.5},
        {"name": "vanilla2", "weight": 5.0},
    ]
    labels = ["n2n,head=mlp", "n2n,loss=huber,delta=0.5", "v2v", "v2v:UV1+MV2", "vanilla1", "vanilla2"]
    train_student(train_config(store, tmp_path, kd=kd, training={"max_steps": 60}))
    for row in read_metrics(tmp_path):
        part = {k.removeprefix("train_"): float(v) for k, v in row.items() if k.startswith("train_")}
        total = part["energy"] + 100 * part["forces"]
        total += sum(term["weight"] * part[label] for term, label in zip(kd, labels, strict=True))
        assert part["loss"] == pytest.approx(total, rel=PRINTED)
    for label in set(labels) - {"vanilla1"}:
        values = column(tmp_path, f"train_{label}")
        assert np.mean(values[-6:]) < 0.9 * np.mean(values[:6])
    assert read_summary(tmp_path)["kd"] == dict(zip(labels, (t["weight"] for t in kd), strict=True))


def test_relations_between_atoms_are_learned(store, tmp_path):
    """With lambda = auto: of the order of the base loss, though a fresh student tells elements apart."""
    texts = ["n2n,head=identity,loss=cka", "n2n,head=identity,loss=gsp", "n2n:U1,loss=lsp", "v2v,loss=gsp"]
    config = train_config(store, tmp_path, kd=parse_kd(texts), training={"max_steps": 100})
    train_student(config)
    base = column(tmp_path, "train_energy")[0] + 100 * column(tmp_path, "train_forces")[0]
    for label, weight in read_summary(tmp_path)["kd"].items():
        values = column(tmp_path, f"train_{label}")
        assert 0.05 * base < weight * values[0] < 5 * base, label
        assert np.mean(values[-6:]) < 0.9 * np.mean(values[:6]), label


def test_one_loss_with_several_taps_is_several_terms(gemnet_store, tmp_path):
    """Each with its column, its head and its weight, from the run to the report."""
    texts = ["n2n=10", "n2n:M1=3", "n2n:H1->U1+U2=2", "e2n:M2=0.5"]
    kd = parse_kd(texts)
    labels = [text.partition("=")[0] for text in texts]
    train_student(train_config(gemnet_store, tmp_path, kd=kd, training={"max_steps": 60}, tensorboard=True))
    for row in read_metrics(tmp_path):
        total = float(row["train_energy"]) + 100 * float(row["train_forces"])
        total += sum(t["weight"] * float(row[f"train_{label}"]) for t, label in zip(kd, labels, strict=True))
        assert float(row["train_loss"]) == pytest.approx(total, rel=PRINTED)
    for label in labels:
        values = column(tmp_path, f"train_{label}")
        assert np.mean(values[-6:]) < 0.9 * np.mean(values[:6]), label
    assert read_summary(tmp_path)["kd"] == dict(zip(labels, (10.0, 3.0, 2.0, 0.5), strict=True))
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert {key.split(".")[1] for key in last["objective"]} == set(labels)
    assert " + ".join(sorted(texts)) in read_run(tmp_path).kd
    provenance = Potential.load(tmp_path).metadata["provenance"]
    assert [term["label"] for term in provenance["kd"]] == labels


def test_rows_between_are_averaged(store, tmp_path):
    """log_every only changes how many steps a row averages."""
    for name, every in (("each", 1), ("third", 3)):
        train_student(train_config(store, tmp_path / name, log_every=every, val_every=12))
    each, third = (column(tmp_path / name, "train_loss") for name in ("each", "third"))
    np.testing.assert_allclose(third, np.reshape(each, (4, 3)).mean(axis=1), rtol=PRINTED)


def test_the_learning_rate_in_the_table_is_the_one_used(store, tmp_path):
    train_student(train_config(store, tmp_path))
    expected = [
        5e-3 * (0.2 + 0.8 * min(1, step / 5)) * 0.01 ** (step / 12) for step in range(12)
    ]  # warm-up of 5 steps, decay over the 12 of the run
    np.testing.assert_allclose(column(tmp_path, "lr"), expected, rtol=PRINTED)


def test_the_exported_student_is_the_average_without_heads(store, tmp_path):
    kd = [{"name": "n2n"}]
    train_student(train_config(store, tmp_path, kd=kd, val_fraction=0.0))
    exported = load_file(tmp_path / "best.safetensors")
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert exported.keys() == build_model(PAINN).state_dict().keys()
    assert all(torch.equal(v, last["ema"][k]) for k, v in exported.items())
    assert any(not torch.equal(v, last["model"][k]) for k, v in exported.items())
    assert [k for k in last["objective"] if "n2n" in k]


def test_validation_and_test_measure_the_exported_student(store, tmp_path):
    test = write_part(tmp_path / "part.extxyz", 0, 12)
    run = tmp_path / "run"
    config = train_config(store, run, test={"part": test}, val_every=4, training={"max_steps": 30})
    summary = train_student(config)
    best = Potential.load(run)
    metrics = evaluate(best.predict, read_systems(test), best.neighbor_rule, batch_size=12).to_report()
    assert summary.test["part"]["energy_mae_meV"] == pytest.approx(metrics["energy_mae_meV"], rel=1e-4)
    assert summary.test["part"]["force_mae_meV_A"] == pytest.approx(metrics["force_mae_meV_A"], rel=1e-4)
    scores = column(run, "val_force_mae_meV_A")
    assert summary.val["force_mae_meV_A"] == pytest.approx(min(scores), rel=PRINTED)
    assert summary.best_step == [4, 8, 12, 16, 20, 24, 28, 30][int(np.argmin(scores))]


def test_a_finished_run_is_left_alone(store, tmp_path, caplog):
    config = train_config(store, tmp_path)
    first = train_student(config)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "config.yaml"}
    with caplog.at_level(logging.INFO, "molkd"):
        assert train_student(config) == first
    assert "finished before, nothing to do" in caplog.text
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "config.yaml"}


def test_other_settings_in_the_same_folder_are_refused(store, tmp_path):
    train_student(train_config(store, tmp_path))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(training, seed\).*--out"):
        train_student(train_config(store, tmp_path, seed=1, training={"lr": 0.1}))
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_a_flipped_bit_stops_the_run(store, tmp_path):
    damaged = tmp_path / "damaged.kdcache"
    shutil.copytree(store, damaged)
    flip_a_bit(damaged, "teachers/teacher/node")
    config = train_config(damaged, tmp_path / "run", kd=[{"name": "n2n"}])
    with pytest.raises(IntegrityError, match=r"teachers/teacher/node"):
        train_student(config)
    result = run_cli(
        "train-student", damaged, "--student", "painn-tiny", "--kd", "n2n", "--out", tmp_path / "cli"
    )
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    assert "teachers/teacher/node" in result.stderr.splitlines()[-1]
    train_student(train_config(damaged, tmp_path / "labels"))  # the rest of the store is as good as ever


@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_follows_full_precision(store, tmp_path, name):
    kd = [{"name": "n2n"}, {"name": "grad"}]  # the second derives twice
    for amp in ("off", "bf16"):
        train_student(train_config(store, tmp_path / amp, model=MODELS[name], amp=amp, kd=kd))
    full, mixed = (column(tmp_path / amp, "train_loss") for amp in ("off", "bf16"))
    assert full != mixed
    np.testing.assert_allclose(mixed[:3], full[:3], rtol=BF16_NOISE)
    assert {v.dtype for v in load_file(tmp_path / "bf16" / "best.safetensors").values()} == {torch.float32}


def test_a_loss_that_is_not_finite_is_reported(store, tmp_path):
    config = train_config(
        store, tmp_path, training={"lr": 1e30, "schedule": {"warmup_steps": 0}}, val_every=12
    )
    with pytest.raises(ModelError, match=r"the loss is not finite around step \d+; lower training\.lr"):
        train_student(config)
    assert not (tmp_path / "best.safetensors").exists()
    assert not (tmp_path / "metrics.json").exists()
    assert np.isfinite(column(tmp_path, "train_loss")).all()


def test_forces_by_gradient_share_the_scale_of_energies(store, tmp_path):
    summary = train_student(train_config(store, tmp_path / "run", model=MODELS["schnet"]))
    assert summary.finished
    scale = Potential.load(tmp_path / "run").scale
    assert scale.forces_std == scale.energy_std


def test_the_summary_is_written_for_others(store, tmp_path):
    train_student(train_config(store, tmp_path, kd=[{"name": "n2n", "weight": 3.0}], seed=5, label="mine"))
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert (summary["seed"], summary["label"], summary["kd"]) == (5, "mine", {"n2n": 3.0})
    cache = Cache.open(store)
    assert summary["dataset_fingerprint"] == cache.fingerprint
    assert summary["teacher"]["weights_sha256"] == cache.teachers["teacher"].provenance["weights_sha256"]
