"""Whole runs of seconds: they learn, say what they do, and refuse what makes no sense."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from distill_cases import (
    COLL,
    MODELS,
    PAINN,
    add_teacher,
    column,
    flip_a_bit,
    ids_of,
    interrupt_after,
    make_store,
    read_metrics,
    read_summary,
    read_systems,
    run_cli,
    scale_of,
    train_config,
)
from safetensors.torch import load_file

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.splits import split_mask
from molkd.pipeline.device import choose_device
from molkd.pipeline.distill import train
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import CacheError, ConfigError, DataError, IntegrityError, ModelError
from molkd.pipeline.evaluation.evaluate import evaluate
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model

COMMENT = 'Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="F F F"'
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
        {"name": "v2v", "weight": 20.0},
        {"name": "vanilla1", "weight": 0.5},
        {"name": "vanilla2", "weight": 5.0},
    ]
    train_student(train_config(store, tmp_path, kd=kd, training={"max_steps": 60}))
    for row in read_metrics(tmp_path):
        part = {k.removeprefix("train_"): float(v) for k, v in row.items() if k.startswith("train_")}
        total = part["energy"] + 100 * part["forces"]
        total += sum(term["weight"] * part[term["name"]] for term in kd)
        assert part["loss"] == pytest.approx(total, rel=PRINTED)
    for term in ("n2n", "v2v", "vanilla2"):
        values = column(tmp_path, f"train_{term}")
        assert np.mean(values[-6:]) < 0.9 * np.mean(values[:6])
    assert read_summary(tmp_path)["kd"] == {t["name"]: t["weight"] for t in kd}


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
    assert all(torch.equal(v, last["ema"][f"module.{k}"]) for k, v in exported.items())
    assert any(not torch.equal(v, last["model"][k]) for k, v in exported.items())
    assert [k for k in last["objective"] if "n2n" in k]


def test_validation_and_test_measure_the_exported_student(store, tmp_path):
    config = train_config(store, tmp_path, test={"all": COLL}, val_every=4, training={"max_steps": 30})
    summary = train_student(config)
    best = Potential.load(tmp_path)
    metrics = evaluate(best.predict, read_systems(), best.neighbor_rule, batch_size=48).to_report()
    assert summary.test["all"]["energy_mae_meV"] == pytest.approx(metrics["energy_mae_meV"], rel=1e-4)
    assert summary.test["all"]["force_mae_meV_A"] == pytest.approx(metrics["force_mae_meV_A"], rel=1e-4)
    scores = column(tmp_path, "val_force_mae_meV_A")
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


def test_an_unfinished_run_refuses_a_store_of_other_systems(store, mixed_store, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 4)
    assert not train_student(train_config(store, tmp_path)).finished
    with pytest.raises(CacheError, match=r"other systems than in the store that .* was begun with"):
        train_student(train_config(mixed_store, tmp_path))


def test_validation_systems_are_split_off_by_id(store, tmp_path):
    """A system keeps its side in a store that holds only a part of the others."""
    half = tmp_path / "half.extxyz"
    text = COLL.read_text().splitlines(keepends=True)
    ends = np.cumsum([s.n_atoms + 2 for s in read_systems()])
    half.write_text("".join(text[: ends[23]]))
    part = Cache.open(make_store(tmp_path / "half.kdcache", half))
    whole = Cache.open(store)
    device = choose_device("cpu")
    sides = []
    for cache in (whole, part):
        setup = prepare(cache, train_config(store, tmp_path, val_fraction=0.3), device)
        assert not (setup.train & setup.val).any()
        assert (setup.train | setup.val).all()
        assert setup.val.any()
        sides.append({row.tobytes(): bool(v) for row, v in zip(cache.ids, setup.val, strict=True)})
    assert sides[1].items() <= sides[0].items()


def test_validation_systems_are_never_trained_on(store, tmp_path, monkeypatch):
    seen, step = set(), train.train_step

    def record(state, sample, *rest):
        seen.update(ids_of(sample))
        return step(state, sample, *rest)

    monkeypatch.setattr(train, "train_step", record)
    config = train_config(store, tmp_path, val_fraction=0.3)
    train_student(config)
    cache = Cache.open(store)
    val = split_mask(cache.ids, 0.3)
    assert seen == {row.tobytes() for row in cache.ids[~val]}


def test_validation_data_of_their_own_leave_the_whole_store_for_training(store, tmp_path):
    setup = prepare(Cache.open(store), train_config(store, tmp_path, val=COLL), choose_device("cpu"))
    assert setup.train.all()
    assert not setup.val.any()


@pytest.mark.parametrize("pseudo_labels", [False, True])
def test_labelled_and_teacher_only_systems_mix(mixed_store, tmp_path, pseudo_labels):
    config = train_config(
        mixed_store,
        tmp_path,
        kd=[{"name": "n2n"}, {"name": "v2v"}, {"name": "vanilla1", "weight": 1.0}],
        pseudo_labels=pseudo_labels,
        training={"max_steps": 60},
    )
    assert train_student(config).finished
    loss = column(tmp_path, "train_loss")
    assert np.isfinite(loss).all()
    assert np.mean(loss[-6:]) < 0.8 * np.mean(loss[:6])
    provenance = Potential.load(tmp_path).metadata["provenance"]
    train = ~split_mask(Cache.open(mixed_store).ids, 0.1)
    energies = Cache.open(mixed_store).energy[train]
    assert provenance["n_training_systems"] == train.sum()
    assert provenance["n_training_energies"] == np.isfinite(energies).sum() < train.sum()


def test_a_store_without_labels_is_learned_from_pseudo_labels(bare_store, tmp_path):
    config = train_config(
        bare_store, tmp_path, pseudo_labels=True, val_fraction=0.75, training={"max_steps": 80, "lr": 0.01}
    )
    summary = train_student(config)
    loss = column(tmp_path, "train_loss")
    assert np.mean(loss[-6:]) < 0.7 * np.mean(loss[:6])
    student = Potential.load(tmp_path)  # written although there is no label to validate on
    assert summary.best_step == 80
    assert student.metadata["provenance"]["n_training_energies"] == 0
    cache = Cache.open(bare_store)
    everything = cache.read(np.arange(48), (), teacher="teacher", signals=("energy", "forces"))
    assert student.scale.forces_std == pytest.approx(
        np.sqrt(np.mean(everything["teacher/forces"][: cache.n_atoms] ** 2)), rel=0.2
    )


@pytest.mark.parametrize(
    "learn", [{"pseudo_labels": True}, {"kd": [{"name": "vanilla2"}]}], ids=["pseudo", "vanilla2"]
)
def test_energies_of_the_teacher_set_the_scale_where_labels_are_forces_only(teacher_file, tmp_path, learn):
    """Else pseudo-labels of hundreds of eV would meet a scale that knows no energies."""
    forces_only = tmp_path / "forces.extxyz"
    forces_only.write_text(COLL.read_text().replace(" energy=", " other="))
    store = add_teacher(make_store(tmp_path / "forces.kdcache", forces_only), teacher_file)
    config = train_config(store, tmp_path / "run", **learn)
    scale = prepare(Cache.open(store), config, choose_device("cpu")).potential.scale
    assert set(scale.references) == {1, 6, 8}
    train_student(config)
    name = "energy" if "pseudo_labels" in learn else "vanilla2"
    assert column(tmp_path / "run", f"train_{name}")[0] < 10


def test_a_store_without_labels_needs_the_teachers(bare_store, tmp_path):
    with pytest.raises(DataError, match=r"no system has an energy or forces.*--pseudo-labels"):
        train_student(train_config(bare_store, tmp_path, kd=[{"name": "n2n"}]))


@pytest.fixture
def quarantined(teacher_file, tmp_path, monkeypatch):
    """A store whose teacher gave NaN for every system of six atoms."""
    from molkd.pipeline.teachers.builtin import BuiltinTeacher

    compute = BuiltinTeacher.compute

    def broken(self, batch, signals):
        out = compute(self, batch, signals)
        six = batch.atoms_ptr.diff() == 6
        out["node"][six[batch.system_idx]] = torch.nan
        return out

    monkeypatch.setattr(BuiltinTeacher, "compute", broken)
    return add_teacher(make_store(tmp_path / "q.kdcache", COLL), teacher_file, skip_bad=True)


def test_quarantined_systems_are_left_out(quarantined, tmp_path, caplog):
    cache = Cache.open(quarantined)
    bad = cache.system_n_atoms == 6
    assert bad.any()
    config = train_config(quarantined, tmp_path / "run", kd=[{"name": "n2n"}], val_fraction=0.0)
    setup = prepare(cache, config, choose_device("cpu"))
    np.testing.assert_array_equal(setup.train, ~bad)
    assert f"{bad.sum()} systems without finite teacher output are left out" in caplog.text
    assert np.isfinite(setup.objective.weights["n2n"])
    train_student(config)
    assert np.isfinite(column(tmp_path / "run", "train_n2n")).all()
    without = train_config(quarantined, tmp_path / "none", val_fraction=0.0)
    assert prepare(cache, without, choose_device("cpu")).train.all()  # labels are as good as ever


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
    kd = [{"name": "n2n"}]
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


def test_a_run_without_kd_reads_no_teacher(store, tmp_path):
    setup = prepare(Cache.open(store), train_config(store, tmp_path), choose_device("cpu"))
    assert setup.teacher is None
    assert setup.signals == ()


@pytest.fixture(scope="module")
def two_teachers(store, teacher_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "two.kdcache"
    shutil.copytree(store, path)
    return add_teacher(path, teacher_file, name="second", signals=("node",), encoding="fp16")


def test_one_of_several_teachers_has_to_be_named(two_teachers, tmp_path):
    kd = [{"name": "n2n"}]
    cache = Cache.open(two_teachers)
    device = choose_device("cpu")
    with pytest.raises(ConfigError, match=r"several teachers \(second, teacher\); choose one with --teacher"):
        prepare(cache, train_config(two_teachers, tmp_path, kd=kd), device)
    with pytest.raises(CacheError, match="no teacher third; it has second, teacher"):
        prepare(cache, train_config(two_teachers, tmp_path, kd=kd, teacher="third"), device)
    assert (
        prepare(cache, train_config(two_teachers, tmp_path, kd=kd, teacher="second"), device).teacher
        == "second"
    )


def test_a_store_without_teacher_is_refused_for_kd(tmp_path):
    path = make_store(tmp_path / "labels.kdcache", COLL)
    with pytest.raises(CacheError, match=r"no teacher in this store; run kd cache-teacher"):
        train_student(train_config(path, tmp_path / "run", kd=[{"name": "n2n"}]))


def test_elements_the_student_does_not_know_are_refused(tmp_path):
    heavy = tmp_path / "heavy.extxyz"
    heavy.write_text(f"2\n{COMMENT}\nPo 0 0 0 0.1 0 0\nH 0 0 1.7 -0.1 0 0\n")
    path = make_store(tmp_path / "heavy.kdcache", heavy)
    with pytest.raises(DataError, match="atomic number 84, but this student knows 1 to 83"):
        train_student(train_config(path, tmp_path / "run", val_fraction=0.0))


def test_held_out_elements_are_checked_too(tmp_path):
    """Before the first step, and not by an index out of range on the device."""
    frames = [f"2\n{COMMENT}\nH 0 0 0 0.1 0 0\nH 0 0 {0.7 + 0.01 * k} -0.1 0 0\n" for k in range(4)]
    frames += [f"2\n{COMMENT}\nPo 0 0 0 0.1 0 0\nH 0 0 {1.7 + 0.01 * k} -0.1 0 0\n" for k in range(20)]
    (tmp_path / "all.extxyz").write_text("".join(frames))
    systems = read_systems(tmp_path / "all.extxyz")
    ids = np.array([np.frombuffer(s.id, np.uint8) for s in systems])
    held_out = int(np.flatnonzero(split_mask(ids, 0.5)[4:])[0]) + 4
    (tmp_path / "two.extxyz").write_text("".join([*frames[:4], frames[held_out]]))
    path = make_store(tmp_path / "two.kdcache", tmp_path / "two.extxyz")
    with pytest.raises(ModelError, match=r"PaiNN does not know Po \(84\)"):
        train_student(train_config(path, tmp_path / "run", val_fraction=0.5))


@pytest.mark.parametrize("term", ["vanilla1", "vanilla2"])
def test_a_teacher_with_another_zero_of_energy_is_refused(teacher_file, tmp_path, term):
    shifted = Potential.load(teacher_file)
    scale = replace(shifted.scale, energy_mean=shifted.scale.energy_mean + 1000)
    Potential(shifted.model, scale, shifted.metadata).save(tmp_path / "shifted.safetensors")
    path = add_teacher(make_store(tmp_path / "coll.kdcache", COLL), tmp_path / "shifted.safetensors")
    with pytest.raises(ConfigError, match=r"differ from the labels by .* take n2n or v2v"):
        train_student(train_config(path, tmp_path / "run", kd=[{"name": term}]))
    assert train_student(train_config(path, tmp_path / "n2n", kd=[{"name": "n2n"}])).finished


@pytest.mark.parametrize(("label", "scale"), [("energy", "energy"), ("forces", "forces")])
def test_one_kind_of_label_is_enough(tmp_path, label, scale):
    text = COLL.read_text().replace(" energy=", " other=") if label == "forces" else COLL.read_text()
    text = text.replace("forces:R:3", "other:R:3") if label == "energy" else text
    (tmp_path / "one.extxyz").write_text(text)
    path = make_store(tmp_path / "one.kdcache", tmp_path / "one.extxyz")
    training = {"normalization": scale, "max_steps": 40, "lr": 0.02}
    summary = train_student(train_config(path, tmp_path / "run", training=training, val_fraction=0.85))
    loss, of_label = (column(tmp_path / "run", f"train_{name}") for name in ("loss", label))
    assert np.mean(loss[-4:]) < 0.95 * np.mean(loss[:4])
    weight = 100 if label == "forces" else 1
    np.testing.assert_allclose(loss, weight * np.array(of_label), rtol=PRINTED)
    metric = {"energy": "energy_mae_meV", "forces": "force_mae_meV_A"}
    assert {name for name in metric if summary.val[metric[name]] is not None} == {label}
    assert Potential.load(tmp_path / "run").scale.forces_std > 0


def test_gradient_forces_need_one_scale(store, tmp_path):
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
