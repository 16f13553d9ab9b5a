"""e2e: students see the teacher's edges, in the order of a batch, or are refused with the remedy."""

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_cases import (
    GEMNET,
    PAINN,
    add_teacher,
    make_store,
    read_systems,
    scale_of,
    train_config,
)

from molkd.cache_schema.reader import Cache
from molkd.pipeline.distill import teacher_graph
from molkd.pipeline.distill.loader import CacheLoader
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.distill.teacher_graph import require_rule, sorted_edges
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.graphs.batch import make_batch
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.teachers.load import load_teacher

CPU = torch.device("cpu")
SCALE = scale_of(read_systems())
E2E = [{"name": "e2e"}]
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}  # of features; stage one computed them in other batches


@pytest.fixture(scope="module")
def edge_store(tmp_path_factory, mixed_store, gemnet_file) -> Path:
    """Molecules and periodic systems, some fixed atoms, with the edges of a GemNet-OC."""
    path = tmp_path_factory.mktemp("edges") / "edges.kdcache"
    make_store(path, mixed_store.parent / "mixed.extxyz")
    return add_teacher(path, gemnet_file, signals=("energy", "forces", "node", "edge"))


def samples_of(store, model, *, picks_edges=False):
    """The samples of one epoch for a student."""
    cache = Cache.open(store)
    loader = CacheLoader(
        cache,
        np.ones(cache.n_systems, dtype=bool),
        model.neighbor_rule,
        SCALE,
        batch_size=8,
        seed=0,
        teacher="teacher",
        signals=("edge",),
        edge_rule=model.edge_rule if picks_edges else None,
    )
    samples = iter(loader)
    try:
        return list(itertools.islice(samples, loader.batches_per_epoch))
    finally:
        samples.close()


def on_rule(batch, rule):
    """The same systems with the edges of another rule."""
    return make_batch(
        atomic_numbers=batch.atomic_numbers.numpy(),
        positions=batch.positions.numpy(),
        n_atoms=batch.atoms_ptr.diff().numpy(),
        cell=batch.cell.numpy(),
        pbc=batch.pbc.numpy(),
        tags=batch.tags.numpy(),
        fixed=batch.fixed.numpy(),
        rule=rule,
    )


def test_batches_are_built_on_the_teachers_edges(edge_store, gemnet_file):
    teacher, student = load_teacher(str(gemnet_file), device="cpu"), build_model(PAINN)
    for batch, targets in samples_of(edge_store, student):
        live = teacher.compute(on_rule(batch, teacher.neighbor_rule), ("edge",))
        assert torch.equal(batch.edge_index, live["edge_index"])
        assert torch.equal(batch.edge_shift, live["edge_shift"])
        torch.testing.assert_close(targets.teacher["edge"], live["edge"], **FLOAT32)
        assert torch.equal(student(batch, ("edge",))["edge_index"], batch.edge_index)


def test_a_student_that_picks_its_edges_gets_its_own_graph(edge_store, gemnet_file):
    teacher, student = load_teacher(str(gemnet_file), device="cpu"), build_model(GEMNET)
    for batch, targets in samples_of(edge_store, student, picks_edges=True):
        assert torch.equal(batch.edge_index, on_rule(batch, student.neighbor_rule).edge_index)
        own = student(batch, ("edge",))
        live = teacher.compute(on_rule(batch, teacher.neighbor_rule), ("edge",))
        assert own["edge_index"].shape[1] < batch.edge_index.shape[1]
        assert torch.equal(own["edge_index"], live["edge_index"])
        assert torch.equal(own["edge_shift"], live["edge_shift"])
        torch.testing.assert_close(targets.teacher["edge"], live["edge"], **FLOAT32)


@pytest.mark.parametrize("config", [PAINN, GEMNET], ids=["painn", "gemnet-oc"])
def test_models_name_the_rule_of_their_edges(edge_store, config):
    """What `edge_rule` finds on the host is what the model's own selection gives."""
    model = build_model(config)
    for batch, _ in samples_of(edge_store, build_model(PAINN)):
        out = model(on_rule(batch, model.neighbor_rule), ("edge",))
        found = on_rule(batch, model.edge_rule)
        assert torch.equal(out["edge_index"], found.edge_index)
        assert torch.equal(out["edge_shift"], found.edge_shift)


def test_edges_in_any_order_are_sorted_with_their_features(edge_store):
    cache = Cache.open(edge_store)
    arrays = cache.read(np.arange(cache.n_systems), ("positions",), "teacher", ("edge",))
    assert sorted_edges(arrays) is arrays
    order = np.random.default_rng(0).permutation(len(arrays["teacher/edge"]))
    mixed = arrays | {
        "teacher/edge": arrays["teacher/edge"][order],
        "teacher/edge/index": arrays["teacher/edge/index"][:, order],
        "teacher/edge/shift": arrays["teacher/edge/shift"][order],
    }
    again = sorted_edges(mixed)
    assert again.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(again[name], values)


def test_a_student_that_does_not_reach_as_far_is_refused(edge_store, tmp_path):
    config = train_config(edge_store, tmp_path, kd=E2E, model=PAINN | {"cutoff": 3.0})
    with pytest.raises(ConfigError) as error:
        train_student(config)
    message = str(error.value)
    assert "edges of teacher teacher have a cutoff of 5 A, test ends at 3 A" in message
    assert "give it --set model.cutoff=5, or" in message
    assert not (tmp_path / "metrics.csv").exists()


def test_the_reach_of_a_teacher_without_a_known_cutoff_is_that_of_its_edges(
    edge_store, tmp_path, monkeypatch
):
    monkeypatch.setattr(teacher_graph, "teacher_config", lambda cache, teacher: {})
    config = train_config(edge_store, tmp_path, kd=E2E, model=PAINN | {"cutoff": 3.0})
    with pytest.raises(ConfigError, match=r"are up to 5.00 A long, test ends at 3 A; .*model.cutoff=5, or"):
        prepare(Cache.open(edge_store), config, CPU)


@pytest.mark.parametrize(
    ("change", "has", "remedy"),
    [
        ({"max_neighbors": 5}, "5 A, 5 n", "max_neighbors=6 with model.max_neighbors_aint no smaller, or"),
        ({"cutoff": 4.0}, "4 A, 6 n", "cutoff=5.0 with model.cutoff_aint no smaller, or"),
        (
            {"cutoff": 4.0, "max_neighbors": 5},
            "4 A, 5 n",
            "cutoff=5.0 --set model.max_neighbors=6 with model.cutoff_aint and model.max_neighbors_aint no",
        ),
    ],
)
def test_a_student_that_picks_other_edges_is_refused(edge_store, tmp_path, change, has, remedy):
    config = train_config(edge_store, tmp_path, kd=E2E, model=GEMNET | change)
    with pytest.raises(ConfigError) as error:
        train_student(config)
    assert f"this student's edges (cutoff {has}eighbors) are not the teacher's" in str(error.value)
    assert f"give it --set model.{remedy}" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "set model.cutoff and model.max_neighbors as the teacher has them, or"),
        ({"cutoff": 5, "max_neighbors": 6, "use_pbc": False}, "give it --set model.use_pbc=false, or"),
        ({"cutoff": 5.0, "enforce_max_neighbors_strictly": False}, "keeps ties .* take a PaiNN"),
    ],
)
def test_the_remedy_names_what_is_known_of_the_teacher(edge_store, settings, remedy):
    cache = Cache.open(edge_store)
    arrays = cache.read(np.arange(4), ("positions", "cell", "pbc"), "teacher", ("edge",))
    arrays["teacher/edge/index"] = arrays["teacher/edge/index"][:, ::-1]
    with pytest.raises(ConfigError, match=remedy):
        require_rule(arrays, build_model(GEMNET).edge_rule, settings)


def test_a_student_whose_ties_no_rule_knows_is_refused(edge_store, tmp_path):
    """Its main graph keeps ties within 0.01 A, a neighbour rule within 0.01 A^2."""
    loose = GEMNET | {"enforce_max_neighbors_strictly": False}
    with pytest.raises(ConfigError, match=r"keeps ties .*--set model.enforce_max_neighbors_strictly=true"):
        prepare(Cache.open(edge_store), train_config(edge_store, tmp_path, kd=E2E, model=loose), CPU)
    others = train_config(edge_store, tmp_path, kd=[{"name": "n2n"}], model=loose)
    assert prepare(Cache.open(edge_store), others, CPU).edge_rule is not None  # nothing asks for its edges


@pytest.mark.parametrize(
    ("term", "model", "message"),
    [
        ({"name": "n2n", "student_taps": ["U9"]}, PAINN, "no scalar features U9"),
        ({"name": "n2n", "head": "identity"}, PAINN, "head identity needs equal widths"),
        ({"name": "e2n"}, PAINN, "kd cache-teacher again with --signals e2n|the teacher gives no e2n"),
        ({"name": "e2e"}, PAINN | {"cutoff": 3.0}, "ends at 3 A"),
    ],
    ids=["tap", "width", "signal", "reach"],
)
def test_a_student_that_does_not_fit_is_refused_before_labels_are_read(
    edge_store, tmp_path, monkeypatch, term, model, message
):
    def read(*arguments):
        raise AssertionError("labels were read")

    monkeypatch.setattr("molkd.pipeline.distill.student.label_statistics", read)
    with pytest.raises(ConfigError, match=message):
        prepare(Cache.open(edge_store), train_config(edge_store, tmp_path, kd=[term], model=model), CPU)


def test_what_differs_between_training_and_use_is_said(edge_store, tmp_path, caplog):
    cache = Cache.open(edge_store)
    with caplog.at_level(logging.INFO, "molkd"):
        prepare(cache, train_config(edge_store, tmp_path, kd=E2E, model=PAINN | {"cutoff": 6.0}), CPU)
    assert "training runs on the teacher's edges" in caplog.text
    assert "of the student's own edges are not among the teacher's" in caplog.text
    caplog.clear()
    same = PAINN | {"cutoff": GEMNET["cutoff"], "max_neighbors": GEMNET["max_neighbors"]}
    with caplog.at_level(logging.INFO, "molkd"):
        prepare(cache, train_config(edge_store, tmp_path, kd=E2E, model=same), CPU)
    assert "training runs on the teacher's edges" in caplog.text
    assert "are not among" not in caplog.text
