"""`--kd auto`: what is chosen from store and student, and that a run keeps its choice."""

import ase
import ase.io
import pytest
from distill_cases import (
    COLL,
    MODELS,
    PAINN,
    add_teacher,
    interrupt_after,
    make_store,
    read_summary,
    read_systems,
    save_teacher,
    train_config,
    write_part,
)

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm, MixConfig, TrainConfig, make_config, parse_kd, read_yaml
from molkd.pipeline.distill.recipe import automatic
from molkd.pipeline.distill.settings import resolve
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import CacheError, ConfigError


def chosen(store, tmp_path, **changes):
    config = automatic(Cache.open(store), train_config(store, tmp_path, kd_auto=True, **changes))
    return [term.label for term in config.kd], config.pseudo_labels


@pytest.mark.parametrize(
    ("model", "expected"),
    [("painn-direct", ["grad", "n2n", "v2v"]), ("painn-gradient", ["n2n", "v2v"]), ("schnet", ["n2n"])],
)
def test_losses_are_those_that_the_student_can_learn(store, tmp_path, model, expected):
    """The slope is new only to direct forces; SchNet has no vectors."""
    assert chosen(store, tmp_path, model=MODELS[model]) == (expected, False)


def test_losses_are_those_that_the_cache_has_signals_for(tmp_path, teacher_file):
    store = add_teacher(make_store(tmp_path / "s.kdcache", COLL), teacher_file, signals=("energy", "node"))
    assert chosen(store, tmp_path) == (["n2n"], False)


def test_the_teacher_labels_what_has_none(mixed_store, tmp_path):
    assert chosen(mixed_store, tmp_path) == (["grad", "n2n", "v2v"], True)


def test_the_teacher_labels_forces_that_are_missing_alone(tmp_path, teacher_file):
    """Without labelled forces nothing else would teach the head of direct forces."""
    frames = [ase.Atoms(s.atomic_numbers, s.positions, info={"energy": s.energy}) for s in read_systems()[:9]]
    ase.io.write(tmp_path / "energies.extxyz", frames)
    store = add_teacher(make_store(tmp_path / "e.kdcache", tmp_path / "energies.extxyz"), teacher_file)
    assert chosen(store, tmp_path) == (["grad", "n2n", "v2v"], True)


def test_an_unfinished_teacher_is_refused_not_left_out(tmp_path, teacher_file):
    """As after a kill in the middle of stage one."""
    store = add_teacher(make_store(tmp_path / "s.kdcache", COLL), teacher_file)
    (store / "manifest.json").unlink()
    (store / "log" / "teachers" / "teacher" / "node" / "000000.json").unlink()
    with pytest.raises(CacheError, match="signal node of teacher is unfinished"):
        train_student(train_config(store, tmp_path / "run", kd_auto=True))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_the_teacher_labels_a_mixed_store_without_labels(store, bare_store, tmp_path):
    mix = (MixConfig(store=bare_store),)
    config = train_config(store, tmp_path, kd_auto=True).model_copy(update={"mix": mix})
    assert automatic(Cache.open(store), config).pseudo_labels


def test_without_a_teacher_only_labels_are_learnt(tmp_path):
    store = make_store(tmp_path / "plain.kdcache", COLL)
    assert chosen(store, tmp_path) == ([], False)
    assert train_student(train_config(store, tmp_path / "run", kd_auto=True)).finished


def test_of_several_teachers_one_has_to_be_named(tmp_path, teacher_file):
    store = make_store(tmp_path / "two.kdcache", write_part(tmp_path / "part.extxyz", 0, 12))
    add_teacher(store, teacher_file)
    add_teacher(store, save_teacher(tmp_path / "other.safetensors", seed=2), name="other", signals=("node",))
    with pytest.raises(ConfigError, match="several teachers"):
        chosen(store, tmp_path)
    assert chosen(store, tmp_path, teacher="other") == (["n2n"], False)


def test_auto_is_what_a_run_does_unless_told_otherwise(store, tmp_path):
    flags = {"store": store, "out": tmp_path, "student": "painn-tiny"}
    assert resolve(None, [], flags).kd_auto
    assert resolve(None, [], flags | {"kd_terms": ("auto",)}).kd_auto
    for told in ("none", "n2n=3"):
        assert not resolve(None, [], flags | {"kd_terms": (told,)}).kd_auto
    (tmp_path / "run.yaml").write_text("kd: [{name: v2v}]\n")
    config = resolve(tmp_path / "run.yaml", [], flags)
    assert (config.kd_auto, config.kd) == (False, (KDTerm(name="v2v"),))
    for terms in ((), ("auto",)):
        with pytest.raises(ConfigError, match="--kd-head and --kd-loss go with losses that --kd names"):
            resolve(None, [], flags | {"kd_terms": terms, "kd_head": "mlp"})
    with pytest.raises(ConfigError, match="auto cannot be combined"):
        parse_kd(["auto", "n2n"])


def test_losses_that_stand_beside_kd_auto_are_not_dropped_in_silence(store, tmp_path, caplog):
    """As in the settings of another run, edited without a look at kd_auto."""
    labels, _ = chosen(store, tmp_path, kd=[{"name": "n2n"}])
    assert labels == ["grad", "n2n", "v2v"]
    assert "the losses under kd in the settings are not taken" in caplog.text


def test_a_run_keeps_what_it_chose_though_the_store_has_grown(tmp_path, teacher_file, monkeypatch):
    """It began without vectors; they are cached while it is interrupted."""
    store = make_store(tmp_path / "s.kdcache", COLL)
    add_teacher(store, teacher_file, signals=("energy", "forces", "node"))
    config = train_config(store, tmp_path / "run", kd_auto=True)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        assert not train_student(config).finished
    add_teacher(store, teacher_file, signals=("v2v",))
    assert train_student(config).finished
    assert list(read_summary(tmp_path / "run")["kd"]) == ["grad", "n2n"]
    kept = make_config(TrainConfig, read_yaml(tmp_path / "run" / "config.yaml"))
    assert [term.label for term in kept.kd] == ["grad", "n2n"]
    assert kept.kd_auto


def test_other_settings_are_still_refused(store, tmp_path):
    train_student(train_config(store, tmp_path / "run", kd_auto=True, training={"max_steps": 2}))
    with pytest.raises(ConfigError, match="training"):
        train_student(train_config(store, tmp_path / "run", kd_auto=True, training={"max_steps": 3}))
    with pytest.raises(ConfigError, match="kd_auto"):
        train_student(train_config(store, tmp_path / "run", model=PAINN, training={"max_steps": 2}))
