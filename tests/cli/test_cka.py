"""`kd cka` within a model, between models and with a store, against numbers from the features themselves."""

import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from stage_one_cases import structures, write_extxyz

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.evaluation.cka_result import CKAResult, load_comparisons
from molkd.pipeline.graphs.batch import batch_from_systems
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.similarity import cka

FLOAT32 = 1e-5  # of features that are computed in batches of other composition


def systems_of(data):
    with closing(open_source(data)) as source:
        return [source.read(i) for i in range(len(source))]


def features_of(model, data, taps):
    """All atoms of all systems in one batch."""
    potential = Potential.load(model)
    batch = batch_from_systems(systems_of(data), potential.neighbor_rule)
    with torch.no_grad():
        out = potential.predict(batch, taps, forces=False)
    return [out[tap].double() for tap in taps]


def table(rows, columns):
    return np.array([[float(cka(x, y)) for y in columns] for x in rows])


def test_within_a_model(kd, everything, tmp_path):
    """Fewer atoms than one batch takes: the value is the one of all atoms at once."""
    out = tmp_path / "out"
    done = kd("cka", everything / "teacher.safetensors", "--data", everything / "test.extxyz", "--out", out)
    assert done.code == 0, done.err
    result = CKAResult.load(out / "cka.json")
    assert result.rows == result.columns == ("layer/M1", "layer/U1", "node")
    taps = features_of(everything / "teacher.safetensors", everything / "test.extxyz", result.rows)
    assert result.values == pytest.approx(table(taps, taps), abs=FLOAT32)
    assert result.n_atoms == len(taps[0])
    assert result.n_systems == 12
    assert "CKA of teacher; " in done.out
    assert (out / "cka.csv").read_text().startswith("tap,layer/M1,layer/U1,node\nlayer/M1,1.000000,")
    assert (out / "cka.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in out.iterdir()} == {"cka.json", "cka.csv", "cka.png"}


def test_some_features_of_a_model_against_others_of_it(kd, everything, tmp_path):
    model, data = everything / "teacher.safetensors", everything / "test.extxyz"
    done = kd("cka", model, "--data", data, "--taps", "M1,U1", "--taps-b", "node", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    result = CKAResult.load(tmp_path / "out" / "cka.json")
    assert (result.rows, result.columns) == (("layer/M1", "layer/U1"), ("node",))
    features = features_of(model, data, (*result.rows, "node"))
    assert result.values == pytest.approx(table(features[:2], features[2:]), abs=FLOAT32)


def test_between_models_of_other_widths(kd, everything, tmp_path):
    names = [everything / "teacher.safetensors", everything / "schnet.safetensors"]
    data = write_extxyz(tmp_path / "molecules.extxyz", [s for s in structures(9) if not s.pbc.any()])
    done = kd("cka", *names, "--data", data, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert content == json.loads((tmp_path / "out" / "cka.json").read_text())
    assert (content["a"], content["b"]) == ("teacher", "schnet")
    rows = features_of(names[0], data, content["rows"])
    columns = features_of(names[1], data, content["columns"])
    assert content["columns"] == ["layer/I1", "node"]
    assert np.array(content["values"]) == pytest.approx(table(rows, columns), abs=FLOAT32)


def test_with_a_teacher_that_is_gone(kd, everything, store, tmp_path):
    """Its signals are matched by system, wherever the systems stand in the data."""
    order = np.random.default_rng(3).permutation(60)[:40]
    data = write_extxyz(tmp_path / "part.extxyz", [structures(60)[i] for i in order] + structures(5, seed=8))
    arguments = ("--store", store, "--data", data, "--taps", "node,v2v", "--out", tmp_path / "out")
    done = kd("cka", everything / "run" / "best.safetensors", *arguments)
    assert done.code == 0, done.err
    result = CKAResult.load(tmp_path / "out" / "cka.json")
    assert result.n_systems == 40
    cache = Cache.open(store)
    by_id = {row.tobytes(): i for i, row in enumerate(cache.ids)}
    rows = [by_id[system.id] for system in systems_of(data)[:40]]
    signals = cache.read(rows, (), teacher="teacher", signals=("node", "v2v"))
    teacher = [torch.from_numpy(signals[f"teacher/{tap}"]).double() for tap in ("node", "v2v")]
    part = write_extxyz(tmp_path / "found.extxyz", [structures(60)[i] for i in order])
    student = features_of(everything / "run", part, ("node", "v2v"))
    assert result.values == pytest.approx(table(student, teacher), abs=FLOAT32)
    assert result.values[0, 0] > 0.3


def test_a_run_keeps_the_result(kd, everything, store, tmp_path):
    run = shutil.copytree(everything / "run", tmp_path / "run")
    assert kd("cka", run, "--store", store, "--out", tmp_path / "out").code == 0
    assert kd("cka", run, "--data", everything / "test.extxyz", "--out", tmp_path / "out").code == 0
    kept = load_comparisons(run)
    assert list(kept) == ["itself-on-test", "teacher-on-train"]
    assert kept["itself-on-test"].within
    assert kept["teacher-on-train"].columns == ("node",)


def test_within_the_teacher_of_a_store(kd, store, tmp_path):
    assert kd("cka", "--store", store, "--taps", "node v2v", "--out", tmp_path / "out").code == 0
    result = CKAResult.load(tmp_path / "out" / "cka.json")
    assert result.a == result.b == "teacher"
    assert np.diag(result.values) == pytest.approx(1)
    cache = Cache.open(store)
    signals = cache.read(np.arange(60), (), teacher="teacher", signals=("node", "v2v"))
    taps = [torch.from_numpy(signals[f"teacher/{tap}"]).double() for tap in ("node", "v2v")]
    assert result.values == pytest.approx(table(taps, taps), abs=FLOAT32)


def test_one_rotation_of_all_systems_changes_nothing(kd, everything, tmp_path):
    """Scalars stay and vectors turn; the inner products of both stay."""
    turned = structures(12, seed=5)
    for atoms in turned:
        atoms.rotate(77, (1, 2, -1), rotate_cell=True)
    tables = {}
    for name, data in (
        ("as-is", write_extxyz(tmp_path / "as-is.extxyz", structures(12, seed=5))),
        ("turned", write_extxyz(tmp_path / "turned.extxyz", turned)),
    ):
        arguments = ("--data", data, "--taps", "U1,node,v2v", "--out", tmp_path / name, "--json")
        done = kd("cka", everything / "teacher.safetensors", *arguments)
        assert done.code == 0, done.err
        tables[name] = np.array(json.loads(done.out)["values"])
    assert tables["turned"] == pytest.approx(tables["as-is"], abs=1e-4)
    assert tables["as-is"][2, 2] == pytest.approx(1)
    assert abs(tables["as-is"][0, 2]) < 0.1 < tables["as-is"][0, 1]


def test_a_sample_is_drawn_by_the_seed(kd, everything, tmp_path):
    def run(seed, batch_size=32):
        arguments = ("--systems", 20, "--seed", seed, "--batch-size", batch_size, "--out", tmp_path / "out")
        done = kd(
            "cka",
            everything / "teacher.safetensors",
            "--data",
            everything / "train.kdcache",
            *arguments,
            "--json",
        )
        assert done.code == 0, done.err
        return json.loads(done.out)

    first = run(0)
    assert first["n_systems"] == 20
    assert first == run(0)
    assert np.array(run(0, batch_size=7)["values"]) == pytest.approx(np.array(first["values"]), abs=FLOAT32)
    assert run(1)["values"] != first["values"]


def test_what_is_refused(refused, everything, store, tmp_path):
    model, out = everything / "teacher.safetensors", tmp_path / "out"
    with_store = ("--store", store, "--out", out)
    says = ["no features U4; did you mean U1", "valid taps: M1"]
    refused("cka", model, "--taps", "U4", *with_store, says=says)
    refused("cka", model, "--taps", "M1", *with_store, says=["teacher: no features M1; did you mean"])
    refused("cka", model, "--taps", "M1", "--taps-b", "energy", *with_store, says=["did you mean node"])
    data = ("--data", everything / "test.extxyz")
    refused("cka", model, *data, *with_store, says=["none of its systems has node of teacher"])
    refused("cka", model, "--out", out, says=["--data"])
    refused("cka", "--data", everything / "test.extxyz", "--out", out, says=["give one model, two"])
    refused("cka", model, model, *with_store, says=["teacher.safetensors and --store are both given"])
    refused("cka", model, "--teacher", "x", *with_store, says=["no teacher x; it has teacher"])
    refused("cka", model, *data, "--teacher", "x", "--out", out, says=["name it with --store"])
    refused("cka", model, *data, "--out", store / "plan.json", says=["is a file; --out takes a folder"])
    strange = ("--data", everything / "strange.extxyz", "--out", out)
    refused("cka", model, *strange, says=["holds N", "was not made for"])
    water = write_extxyz(tmp_path / "water.extxyz", structures(2)[1:])
    says = ["needs 4 atoms or more, the 1 systems hold fewer"]
    refused("cka", model, "--data", water, "--out", out, says=says)


def test_bare_stores(refused, everything, tmp_path):
    out = tmp_path / "out"
    refused("cka", "--store", everything / "bare.kdcache", "--out", out, says=["no teacher in this store"])
