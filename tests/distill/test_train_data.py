"""Which systems, labels and teachers of a store a run takes, and which it refuses."""

import shutil
from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch
from distill_cases import (
    COLL,
    MODELS,
    add_teacher,
    before_step,
    column,
    ids_of,
    interrupt_after,
    make_store,
    read_systems,
    save_teacher,
    train_config,
    write_part,
)

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.splits import split_mask
from molkd.pipeline.device import choose_device
from molkd.pipeline.distill import held_out, statistics, train
from molkd.pipeline.distill.run_folder import RunFolder
from molkd.pipeline.distill.step import initial_state
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import CacheError, ConfigError, DataError, ModelError
from molkd.pipeline.models.potential import Potential

COMMENT = 'Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="F F F"'
CPU = torch.device("cpu")
PRINTED = 1e-6  # relative; metrics.csv keeps 8 digits


def test_an_unfinished_run_refuses_a_store_of_other_systems(store, mixed_store, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 4)
    assert not train_student(train_config(store, tmp_path)).finished
    with pytest.raises(CacheError, match=r"other systems .*than those that .* was begun with"):
        train_student(train_config(mixed_store, tmp_path))


def test_validation_systems_are_split_off_by_id(store, tmp_path):
    """A system keeps its side in a store that holds only a part of the others."""
    half = write_part(tmp_path / "half.extxyz", 0, 24)
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


def test_what_is_held_out_is_never_trained_on_even_if_it_is_in_the_store(
    store, tmp_path, monkeypatch, caplog
):
    seen, step = set(), train.train_step

    def record(state, sample, *rest):
        seen.update(ids_of(sample))
        return step(state, sample, *rest)

    monkeypatch.setattr(train, "train_step", record)
    val, test = write_part(tmp_path / "val.extxyz", 0, 6), write_part(tmp_path / "test.extxyz", 6, 10)
    train_student(train_config(store, tmp_path / "run", val=val, test={"test": test}))
    assert "10 systems of the store are in the validation or test data too" in caplog.text
    assert seen == {s.id for s in read_systems()[10:]}


def test_another_validation_set_behind_a_begun_run_is_refused(store, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 4)
    first, second = write_part(tmp_path / "a.extxyz", 0, 6), write_part(tmp_path / "b.extxyz", 6, 12)
    assert not train_student(train_config(store, tmp_path / "run", val=first)).finished
    with pytest.raises(CacheError, match="other training systems and validation systems than those"):
        train_student(train_config(store, tmp_path / "run", val=second))


def test_two_processes_do_not_train_in_one_folder(store, tmp_path):
    config = train_config(store, tmp_path)
    with RunFolder(tmp_path).locked(), pytest.raises(ConfigError, match="another process is training"):
        train_student(config)
    assert train_student(config).finished


def with_nitrogen(path, energy):
    """Frames with an N atom in place of every first atom; their energies are `energy` or none."""
    frames = ase.io.read(COLL, "30:42")
    for frame in frames:
        frame.numbers[0] = 7
        frame.calc = None
        frame.info.pop("energy", None)
        if energy is not None:
            frame.info["energy"] = energy
    ase.io.write(path, frames)
    return path


@pytest.mark.parametrize("terms", [[{"name": "n2n"}], [{"name": "vanilla1"}], [{"name": "vanilla2"}]])
def test_an_element_without_labels_gets_the_teachers_reference_or_no_energy(tmp_path, terms):
    """48 labelled systems of C, H, O; nitrogen only in structures that the teacher alone knows."""
    labelled = write_part(tmp_path / "labelled.extxyz", 0, 30)
    pool = with_nitrogen(tmp_path / "pool.extxyz", None)
    reference = -111.0
    teacher = Potential.load(save_teacher(tmp_path / "teacher.safetensors"))
    teacher.scale = replace(teacher.scale, references={**teacher.scale.references, 7: reference})
    teacher.save(tmp_path / "teacher.safetensors")
    store = make_store(tmp_path / "mixed.kdcache", labelled, drop_labels=(pool,))
    add_teacher(store, tmp_path / "teacher.safetensors")
    setup = prepare(Cache.open(store), train_config(store, tmp_path, kd=terms), choose_device("cpu"))
    if terms[0]["name"] == "n2n":
        assert 7 not in setup.potential.scale.references
        assert 7 not in setup.potential.elements
    else:
        assert setup.potential.scale.references[7] == pytest.approx(reference, abs=20.0)
        assert 7 in setup.potential.elements
        loader = initial_state(Cache.open(store), setup, train_config(store, tmp_path, kd=terms), CPU).loader
        signal = "energy" if terms[0]["name"] == "vanilla1" else "atomic_energies"
        values = torch.cat(
            [next(samples).targets.teacher[signal] for samples in [iter(loader)] for _ in range(4)]
        )
        assert values.abs().max() < 50  # in label scales; without its reference nitrogen is off by a hundred


def test_rare_elements_behind_the_sample_are_seen(tmp_path, monkeypatch):
    """With a sample of ten systems, nitrogen in the others still gets its reference from their labels."""
    monkeypatch.setattr(statistics, "_MAX_SYSTEMS", 10)
    monkeypatch.setattr(statistics, "_RARE", 3)
    monkeypatch.setattr(statistics, "_CHUNK", 5)
    labelled = write_part(tmp_path / "labelled.extxyz", 0, 30)
    store = make_store(tmp_path / "n.kdcache", labelled, with_nitrogen(tmp_path / "n.extxyz", -400.0))
    cache = Cache.open(store)
    found = statistics.label_statistics(cache, np.ones(cache.n_systems, dtype=bool))
    assert found.elements == (1, 6, 7, 8)
    assert (found.counts[:, 7] > 0).sum() >= 3
    assert len(found.energies) < cache.n_systems


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
    assert column(tmp_path / "run", f"train_{name}")[0] < 30  # of hundreds


@pytest.mark.parametrize("term", ["n2n", "grad"])
def test_a_store_without_labels_needs_the_teachers(bare_store, tmp_path, term):
    """The slope of an energy is no energy, and teaches direct forces nothing."""
    with pytest.raises(DataError, match=r"no system has an energy or forces.*--pseudo-labels"):
        train_student(train_config(bare_store, tmp_path, kd=[{"name": term}]))


def test_the_slope_is_all_that_forces_by_gradient_need(bare_store, tmp_path):
    config = train_config(bare_store, tmp_path, model=MODELS["schnet"], kd=[{"name": "grad"}])
    assert prepare(Cache.open(bare_store), config, CPU).train.any()


@pytest.fixture(scope="module")
def energies_only(teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("energies")
    (folder / "one.extxyz").write_text(COLL.read_text().replace("forces:R:3", "other:R:3"))
    return add_teacher(make_store(folder / "one.kdcache", folder / "one.extxyz"), teacher_file)


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"kd": [{"name": "grad"}]}, True),
        ({"kd": [{"name": "vanilla1"}]}, False),
        ({"pseudo_labels": True}, False),
        ({"kd": [{"name": "grad"}], "model": MODELS["painn-gradient"]}, False),
    ],
    ids=["grad", "vanilla1", "pseudo", "gradient"],
)
def test_direct_forces_that_nothing_teaches_are_told_of(energies_only, tmp_path, caplog, changes, warns):
    config = train_config(energies_only, tmp_path, training={"normalization": "energy"}, **changes)
    prepare(Cache.open(energies_only), config, CPU)
    assert ("nothing teaches this student its direct forces" in caplog.text) is warns


def test_the_slope_of_labels_needs_labelled_forces(energies_only, tmp_path):
    training = {"gradient_weight": 1.0, "normalization": "energy"}
    with pytest.raises(ConfigError, match="gradient_weight needs labelled forces"):
        train_student(train_config(energies_only, tmp_path, training=training))


@pytest.fixture
def quarantined(teacher_file, tmp_path, monkeypatch):
    """A store whose teacher gave NaN for every system of six atoms."""
    from molkd.pipeline.teachers.potential_teacher import PotentialTeacher

    compute = PotentialTeacher.compute

    def broken(self, batch, signals):
        out = compute(self, batch, signals)
        six = batch.atoms_ptr.diff() == 6
        out["node"][six[batch.system_idx]] = torch.nan
        return out

    monkeypatch.setattr(PotentialTeacher, "compute", broken)
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
    with pytest.raises(ModelError, match=r"heavy.extxyz#0: holds Po \(atomic number 84\)"):
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
    with pytest.raises(ModelError, match=r"two.kdcache#.*holds Po \(atomic number 84\)"):
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


def test_labels_of_held_out_files_can_be_named(store, tmp_path):
    frames = ase.io.read(COLL, "0:6")
    for frame in frames:
        frame.info["E_dft"], frame.arrays["F_dft"] = frame.get_potential_energy(), frame.get_forces()
        frame.calc = None
    ase.io.write(tmp_path / "val.extxyz", frames)
    named = {"energy_key": "E_dft", "forces_key": "F_dft"}
    plain = train_student(train_config(store, tmp_path / "a", val=write_part(tmp_path / "part.extxyz", 0, 6)))
    summary = train_student(train_config(store, tmp_path / "b", val=tmp_path / "val.extxyz", **named))
    assert summary.val == pytest.approx(plain.val, rel=1e-6)


def test_held_out_files_are_read_once_before_the_first_step(store, tmp_path, monkeypatch):
    opened, open_source = [], held_out.open_source

    def record(path, **keys):
        opened.append(path.name)
        return open_source(path, **keys)

    monkeypatch.setattr(held_out, "open_source", record)
    before_step(monkeypatch, 0, lambda: opened.append("first step"))
    val, test = write_part(tmp_path / "val.extxyz", 0, 6), write_part(tmp_path / "test.extxyz", 6, 10)
    train_student(train_config(store, tmp_path / "run", val=val, test={"test": test}))
    assert opened == ["val.extxyz", "test.extxyz", "first step", "test.extxyz"]
