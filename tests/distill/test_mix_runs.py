"""Runs on several stores: what is trained on, in which scale, with which teacher; going on after a stop."""

import logging
import shutil

import ase.io
import numpy as np
import pytest
import torch
from distill_cases import (
    COLL,
    PAINN,
    add_teacher,
    assert_same_run,
    before_step,
    column,
    ids_of,
    interrupt_after,
    make_store,
    read_summary,
    read_systems,
    save_teacher,
    train_config,
    write_part,
)

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.references import N_ELEMENTS, LabelScale
from molkd.pipeline.data.splits import split_mask
from molkd.pipeline.distill import train
from molkd.pipeline.distill.mixed_stores import add_references
from molkd.pipeline.distill.settings import resolve
from molkd.pipeline.distill.statistics import LabelStatistics
from molkd.pipeline.distill.step import initial_state
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import CacheError, ConfigError, DataError
from molkd.pipeline.evaluation.runs import read_run
from molkd.pipeline.models.potential import Potential

CPU = torch.device("cpu")
N2N = [{"name": "n2n"}, {"name": "v2v"}]
SIGNALS = ("energy", "forces", "atomic_energies", "node", "v2v", "edge")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, teacher_file):
    """Frames 0 to 32 with labels, and 26 to 48 with the teacher's signals only: six stand in both."""
    folder = tmp_path_factory.mktemp("stores")
    main, pool = write_part(folder / "main.extxyz", 0, 32), write_part(folder / "pool.extxyz", 26, 48)
    return (
        add_teacher(make_store(folder / "main.kdcache", main), teacher_file, signals=SIGNALS),
        add_teacher(
            make_store(folder / "pool.kdcache", drop_labels=(pool,)),
            teacher_file,
            signals=SIGNALS,
            name="other-name",
            encoding="fp16",
        ),
    )


def mix_config(stores, out, *, weight=0.5, **changes):
    """Batches of 6 + 2."""
    mix = [{"store": stores[1], "share": 0.25, "weight": weight}]
    return train_config(stores[0], out, **({"kd": N2N, "mix": mix} | changes))


@pytest.fixture
def seen(monkeypatch):
    """The ids of every batch that is trained on."""
    batches, step = [], train.train_step

    def record(state, sample, *rest):
        batches.append(ids_of(sample))
        return step(state, sample, *rest)

    monkeypatch.setattr(train, "train_step", record)
    return batches


def test_a_run_takes_its_share_of_both_stores_and_says_so(stores, tmp_path, seen, caplog):
    with caplog.at_level(logging.INFO, "molkd"):
        train_student(mix_config(stores, tmp_path, val_fraction=0.0))
    main, pool = ({row.tobytes() for row in Cache.open(path).ids} for path in stores)
    assert all(len([i for i in ids if i in main]) == 6 for ids in seen[:5])  # 32 systems: 5 x 6 and 2
    assert [len(ids) for ids in seen[:7]] == [8, 8, 8, 8, 8, 3, 8]
    assert {i for ids in seen for i in ids} == main | pool
    assert all(not (set(ids[6:]) & main) for ids in seen[:5])  # what stands in both comes from the main store
    assert "6 systems stand in a store before it too" in caplog.text
    assert (
        "16 systems, 2 of 8 in a batch; its loss weight 0.5714, that of the main store 1.143" in caplog.text
    )
    (told,) = read_summary(tmp_path)["mix"]
    assert told == Potential.load(tmp_path).metadata["provenance"]["mix"][0]
    assert told["store"] == "pool.kdcache"
    assert told["dataset_fingerprint"] == Cache.open(stores[1]).fingerprint
    assert (told["n_training_systems"], told["n_training_energies"], told["systems_a_batch"]) == (16, 0, 2)
    assert (told["share"], told["weight_ratio"]) == (0.25, 0.5)
    assert told["loss_weight"] == pytest.approx(4 / 7)


def test_what_the_main_store_validates_on_is_not_trained_on_from_another_store(stores, tmp_path, seen):
    test = write_part(tmp_path / "test.extxyz", 40, 44)
    config = mix_config(stores, tmp_path / "run", val_fraction=0.5, test={"test": test})
    train_student(config)
    cache = Cache.open(stores[0])
    val = {row.tobytes() for row in cache.ids[split_mask(cache.ids, 0.5)]}
    pool = {row.tobytes() for row in Cache.open(stores[1]).ids}
    held_out = val | {s.id for s in read_systems()[40:44]}
    trained = {i for ids in seen for i in ids}
    assert val & pool  # a system of the pool is validated on
    assert trained == {s.id for s in read_systems()} - held_out


def test_scale_lambdas_and_order_are_those_of_the_main_store_alone(stores, tmp_path):
    setups = [
        prepare(Cache.open(stores[0]), mix_config(stores, tmp_path, **changes), CPU)
        for changes in ({}, {"mix": []})
    ]
    assert setups[0].potential.scale == setups[1].potential.scale
    assert setups[0].objective.weights == setups[1].objective.weights
    np.testing.assert_array_equal(setups[0].train, setups[1].train)


def test_the_total_of_a_step_is_the_weighted_sum_by_origin(stores, tmp_path):
    """n2n of a mixed batch against the sum over its atoms, weights of Eqs. 10 and 11 by hand."""
    config = mix_config(stores, tmp_path, val_fraction=0.0, pseudo_labels=True)
    setup = prepare(Cache.open(stores[0]), config, CPU)
    state = initial_state(Cache.open(stores[0]), setup, config, CPU)
    samples = iter(state.loader)
    sample = next(samples)
    samples.close()
    model = setup.potential.model
    outputs = model(sample.batch, state.objective.taps)
    parts = state.objective(outputs, sample.targets).parts
    weight = torch.tensor([8 / 7] * 6 + [4 / 7] * 2)[sample.batch.system_idx]
    mapped = state.objective.heads["n2n"](outputs["node"])
    rows = (mapped - sample.targets.teacher["node"]).square().mean(dim=1)  # (N,)
    assert parts["n2n"].item() == pytest.approx((weight * rows).sum().item() / len(rows), rel=1e-5)


STOPPED = {"checkpoint_every": 4, "log_every": 3, "val_every": 5, "training": {"max_steps": 15}}


@pytest.fixture(scope="module")
def uninterrupted(stores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_student(mix_config(stores, folder, **STOPPED))
    return folder


@pytest.mark.parametrize("n_steps", [1, 5, 9])  # after the first step, an epoch of 5, in the second one
def test_an_interrupted_run_continues_bitwise(stores, tmp_path, uninterrupted, monkeypatch, n_steps):
    config = mix_config(stores, tmp_path, **STOPPED)
    with monkeypatch.context() as patch:
        interrupt_after(patch, n_steps)
        assert train_student(config).steps == n_steps
    assert train_student(config).finished
    assert_same_run(tmp_path, uninterrupted)


def test_a_crash_falls_back_to_the_last_checkpoint(stores, tmp_path, uninterrupted, monkeypatch):
    def crash():
        raise ZeroDivisionError

    config = mix_config(stores, tmp_path, **STOPPED)
    with monkeypatch.context() as patch:
        before_step(patch, 7, crash)
        with pytest.raises(ZeroDivisionError):
            train_student(config)
    train_student(config)
    assert_same_run(tmp_path, uninterrupted)


def test_a_stopped_run_finds_moved_stores_and_refuses_other_ones(stores, tmp_path, monkeypatch, teacher_file):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        train_student(mix_config(stores, tmp_path / "run"))
    smaller = add_teacher(
        make_store(tmp_path / "s.kdcache", drop_labels=(write_part(tmp_path / "s.extxyz", 40, 48),)),
        teacher_file,
    )
    with pytest.raises(CacheError, match=r"other mixed systems than those that .*--mix"):
        train_student(mix_config((stores[0], smaller), tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"other settings \(mix\)"):
        train_student(mix_config(stores, tmp_path / "run", weight=2.0))
    moved = tmp_path / "moved.kdcache"
    shutil.copytree(stores[1], moved)
    assert train_student(mix_config((stores[0], moved), tmp_path / "run")).finished


def test_every_loss_learns_from_both_stores(stores, tmp_path):
    """Features, edges and energies, pseudo-labels for what has no label: all terms stay finite and fall."""
    kd = [*N2N, {"name": "e2e"}, {"name": "vanilla1", "weight": 0.1}, {"name": "vanilla2"}]
    config = mix_config(
        stores,
        tmp_path,
        kd=kd,
        pseudo_labels=True,
        model=PAINN | {"cutoff": 5.0},
        training={"max_steps": 60},
    )
    train_student(config)
    for name in ("loss", "n2n", "e2e", "vanilla1", "vanilla2"):
        values = column(tmp_path, f"train_{name}")
        assert np.isfinite(values).all()
        assert np.mean(values[-6:]) < 0.9 * np.mean(values[:6]), name


def test_the_teacher_is_found_under_another_name_and_another_one_is_refused(stores, tmp_path):
    setup = prepare(Cache.open(stores[0]), mix_config(stores, tmp_path), CPU)
    assert (setup.teacher, setup.mixed[0].teacher) == ("teacher", "other-name")
    other = make_store(tmp_path / "other.kdcache", write_part(tmp_path / "o.extxyz", 40, 48))
    with pytest.raises(CacheError, match=r"other.kdcache: its teacher is not teacher of .*it has none"):
        prepare(Cache.open(stores[0]), mix_config((stores[0], other), tmp_path), CPU)
    add_teacher(other, save_teacher(tmp_path / "2.safetensors", seed=2))
    with pytest.raises(CacheError, match=r"is not teacher of .*weights_sha256 \w{16}\.\.\., given \w{16}"):
        prepare(Cache.open(stores[0]), mix_config((stores[0], other), tmp_path), CPU)


def test_the_same_teacher_in_another_precision_is_refused(stores, tmp_path, teacher_file):
    other = make_store(tmp_path / "other.kdcache", write_part(tmp_path / "o.extxyz", 40, 48))
    add_teacher(other, teacher_file, precision="float64")
    with pytest.raises(CacheError, match=r"precision float32, given float64"):
        prepare(Cache.open(stores[0]), mix_config((stores[0], other), tmp_path), CPU)


def test_a_signal_that_a_store_lacks_is_named(stores, tmp_path, teacher_file):
    other = make_store(tmp_path / "other.kdcache", write_part(tmp_path / "o.extxyz", 40, 48))
    add_teacher(other, teacher_file, signals=("node",))
    with pytest.raises(CacheError, match=r"other.kdcache: lacks signal v2v .*--signals v2v"):
        prepare(Cache.open(stores[0]), mix_config((stores[0], other), tmp_path), CPU)


def test_a_store_that_adds_nothing_is_refused(stores, tmp_path, teacher_file):
    part = make_store(tmp_path / "part.kdcache", write_part(tmp_path / "p.extxyz", 4, 9))
    add_teacher(part, teacher_file)
    with pytest.raises(DataError, match=r"part.kdcache: nothing to mix in"):
        prepare(Cache.open(stores[0]), mix_config((stores[0], part), tmp_path), CPU)


def test_without_kd_only_labelled_systems_are_mixed_in(stores, tmp_path):
    with pytest.raises(DataError, match=r"pool.kdcache: no system has an energy or forces .*--pseudo-labels"):
        prepare(Cache.open(stores[0]), mix_config(stores, tmp_path, kd=[]), CPU)
    half = make_store(
        tmp_path / "half.kdcache",
        write_part(tmp_path / "a.extxyz", 32, 40),
        drop_labels=(write_part(tmp_path / "b.extxyz", 40, 48),),
    )
    setup = prepare(Cache.open(stores[0]), mix_config((stores[0], half), tmp_path, kd=[]), CPU)
    assert setup.teacher is setup.mixed[0].teacher is None
    np.testing.assert_array_equal(setup.mixed[0].train, np.isfinite(Cache.open(half).energy))


def statistics(compositions, energies):
    counts = np.zeros((len(energies), N_ELEMENTS), dtype=np.int64)
    for row, composition in enumerate(compositions):
        for z, n in composition.items():
            counts[row, z] = n
    elements = tuple(int(z) for z in np.flatnonzero(counts.any(axis=0)))
    return LabelStatistics(counts, np.array(energies), 1.0, 1.0, elements, 1)


SCALE = LabelScale(energy_mean=2.0, energy_std=3.0, forces_std=3.0, references={1: -10.0, 8: -100.0})


def test_elements_of_further_stores_get_what_known_ones_and_the_mean_leave(tmp_path):
    """H2 N leaves -273 + 20 - 2 = -255 for N, and H N2 O -628 + 10 + 100 - 2 = -520 for two of them."""
    found = statistics(
        [{1: 2, 7: 1}, {1: 1, 7: 2, 8: 1}, {1: 2, 8: 1}, {16: 1}], [-273.0, -628.0, -500.0, np.nan]
    )
    scale = add_references(SCALE, [found], train_config(tmp_path, tmp_path))
    # Least squares of one unknown: (1 x -255 + 2 x -520) / (1 + 4).
    assert scale.references == pytest.approx({1: -10.0, 7: -259.0, 8: -100.0})
    assert (scale.energy_mean, scale.energy_std, scale.forces_std) == (2.0, 3.0, 3.0)


def test_given_references_have_to_hold_every_element(tmp_path):
    config = train_config(tmp_path, tmp_path, training={"references": {1: -10.0, 8: -100.0}})
    with pytest.raises(DataError, match="no energy reference for N"):
        add_references(SCALE, [statistics([{1: 2, 7: 1}], [-273.0])], config)
    assert add_references(SCALE, [statistics([{1: 2, 7: 1}], [np.nan])], config) == SCALE


def test_energies_in_further_stores_only_have_nothing_to_be_normalised_by(tmp_path):
    forces_only = LabelScale(0.0, 1.0, 1.0, {})
    with pytest.raises(DataError, match="only further stores have energies"):
        add_references(forces_only, [statistics([{1: 2}], [-30.0])], train_config(tmp_path, tmp_path))


def test_a_new_element_is_learnt_and_predicted(stores, tmp_path):
    """Nitrogen stands only in labelled systems of the second store; its first losses are not of hundreds."""
    frames = ase.io.read(COLL, "32:48")
    for frame in frames:
        frame.numbers[0] = 7
        frame.calc = None
        frame.info["energy"] = -300.0 - len(frame)
    ase.io.write(tmp_path / "n.extxyz", frames)
    other = make_store(tmp_path / "n.kdcache", tmp_path / "n.extxyz")
    config = mix_config((stores[0], other), tmp_path / "run", kd=[])
    train_student(config)
    student = Potential.load(tmp_path / "run")
    alone = prepare(Cache.open(stores[0]), mix_config(stores, tmp_path, kd=[], mix=[]), CPU).potential.scale
    assert {z: e for z, e in student.scale.references.items() if z != 7} == alone.references
    assert 7 in student.elements
    assert max(column(tmp_path / "run", "train_energy")) < 100  # of label scales; 300 eV are more


def test_flags_give_one_value_for_all_or_one_for_each(stores):
    flags = {"store": stores[0], "student": "painn-tiny", "out": "run"}
    mixed = resolve(None, (), flags | {"mix": stores[1:], "mix_share": (0.1,), "mix_weight": (2.0,)}).mix
    assert [(m.store, m.share, m.weight) for m in mixed] == [(stores[1], 0.1, 2.0)]
    two = resolve(None, (), flags | {"mix": ("a", "b"), "mix_weight": (2.0, 3.0)}).mix
    assert [(m.share, m.weight) for m in two] == [(0.25, 2.0), (0.25, 3.0)]
    for wrong in ({"mix_share": (0.1,)}, {"mix": ("a", "b", "c"), "mix_share": (0.1, 0.2)}):
        with pytest.raises(ConfigError, match="--mix-share is given"):
            resolve(None, (), flags | wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotated_targets": True, "mix": [{"store": "b"}]}, "rotated_targets takes one store"),
        ({"mix": [{"store": "b"}, {"store": "b"}]}, "the same store twice"),
        ({"mix": [{"store": "a"}]}, "the same store twice"),
        ({"mix": [{"store": "b", "share": 1.0}]}, "share"),
        ({"mix": [{"store": "b", "weight": 0.0}]}, "weight"),
        ({"mix": [{"store": "b", "ratio": 1.0}]}, "unknown setting mix.0.ratio"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_config("a", tmp_path, **changes)


def test_reports_tell_mixed_runs_apart_wherever_their_stores_lie(stores, tmp_path):
    found = {}
    for name, changes in {"plain": {"mix": []}, "mixed": {}, "heavy": {"weight": 2.0}}.items():
        train_student(mix_config(stores, tmp_path / name, training={"max_steps": 1}, **changes))
        found[name] = read_run(tmp_path / name).kd
    plain = found.pop("plain")
    assert plain.startswith("n2n=")
    assert found == {
        "mixed": f"{plain} + 0.25 of pool (weight 0.5)",
        "heavy": f"{plain} + 0.25 of pool (weight 2)",
    }
