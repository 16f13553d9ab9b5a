"""`kd cache verify --deep` finds values that no checksum betrays, and only those."""

import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
from stage_one_cases import make_store, structures, write_extxyz, write_teacher

from molkd.cache_schema import jsonfile
from molkd.cache_schema.crc import crc32c, crc_hex
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.pipeline import deep_verify as module
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.deep_verify import deep_verify
from molkd.pipeline.errors import CacheError
from molkd.pipeline.teachers.load import load_teacher

N = 20
RECOMPUTED = {f"{s} = recomputed" for s in ("energy", "forces", "atomic_energies", "node", "edge")}
SUMS = {"energy = sum of atomic_energies", "e2n = sum of edge", "v2v = sum of edge x direction"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with all signals of a GemNet-OC and of a PaiNN, edges included; the PaiNN in float64."""
    folder = tmp_path_factory.mktemp("deep")
    store = make_store(folder / "s.kdcache", write_extxyz(folder / "a.xyz", structures(N)))
    for kind, precision in (("gemnet", "float32"), ("painn", "float64")):
        path = write_teacher(folder / kind, kind)
        cache_teacher(
            CacheConfig(store=store, teacher=str(path), signals=("all", "edge"), precision=precision)
        )
    return folder


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made / "s.kdcache", tmp_path / "s.kdcache")


def change(store, group, row, column, value, code="e"):
    """Put another value into shard 0 of a signal and bring every checksum in line, as a forger would."""
    (store / "manifest.json").unlink(missing_ok=True)
    path = next(p for p in (store / "data.zarr" / group / "values/c").rglob("0*") if p.is_file())
    array = json.loads((store / "data.zarr" / group / "values/zarr.json").read_text())
    row_bytes = int(np.prod(array["shape"][1:], dtype=int)) * struct.calcsize(code)
    raw = bytearray(path.read_bytes())
    struct.pack_into(f"<{code}", raw, row * row_bytes + column * struct.calcsize(code), value)
    path.write_bytes(raw)

    record = store / "log" / group / "000000.json"
    document, _ = jsonfile.read_sealed(record, max_bytes=1 << 20, remedy="")
    entry = document["arrays"]["values"]
    is_sharded = array["codecs"][0]["name"] == "sharding_indexed"
    chunk = 1024 * row_bytes if is_sharded else len(raw)
    chunks = [bytes(raw[k * chunk : (k + 1) * chunk]) for k in range(len(entry["chunk_crc32c"]))]
    entry["chunk_crc32c"] = [crc_hex(crc32c(one)) for one in chunks]
    entry["crc32c"] = crc_hex(crc32c(bytes(raw)))
    record.write_bytes(jsonfile.seal(document))


def by_name(report, teacher):
    return {check.what: check for check in report.checks if check.teacher == teacher}


def test_a_sound_store(made):
    report = deep_verify(made / "s.kdcache", n_systems=8)
    assert report.ok
    assert set(by_name(report, "gemnet")) == SUMS
    assert set(by_name(report, "painn")) == {
        "energy = sum of atomic_energies"
    }  # its v2v is no sum over edges
    assert all(len(systems) == 8 for systems in report.systems.values())
    for kind in ("gemnet", "painn"):
        report = deep_verify(made / "s.kdcache", teacher=str(made / f"{kind}.safetensors"))
        assert report.ok, report.text()
        assert list(report.systems) == [kind]
        assert report.systems[kind] == list(range(N))  # fewer than the sample would be
        checks = by_name(report, kind)
        assert checks.keys() >= RECOMPUTED
        assert (checks.keys() >= SUMS) == (kind == "gemnet")
        half = checks["node = recomputed"]
        # Half precision rounds by up to 2**-11, which is what a deviation is measured against.
        assert 2**-14 < half.largest / half.rms < 2**-8
        assert 0 < half.mean < half.largest <= half.allowed
        assert checks["energy = recomputed"].largest < 1e-4
        assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"]


@pytest.mark.parametrize(
    ("group", "column", "code", "wrong"),
    [
        ("gemnet/node", 3, "e", {"node = recomputed"}),
        ("gemnet/edge", 3, "e", {"edge = recomputed", "e2n = sum of edge", "v2v = sum of edge x direction"}),
        ("gemnet/e2n", 2, "e", {"e2n = recomputed", "e2n = sum of edge"}),
        ("gemnet/v2v", 21, "e", {"v2v = recomputed", "v2v = sum of edge x direction"}),
        ("gemnet/layer/H1", 0, "e", {"layer/H1 = recomputed"}),
        ("gemnet/forces", 1, "f", {"forces = recomputed"}),
        (
            "gemnet/atomic_energies",
            0,
            "d",
            {"atomic_energies = recomputed", "energy = sum of atomic_energies"},
        ),
        ("painn/energy", 0, "d", {"energy = recomputed", "energy = sum of atomic_energies"}),
        ("painn/edge", 1, "e", {"edge = recomputed"}),
    ],
)
def test_a_forged_value_is_found(made, store, group, column, code, wrong):
    """By one percent of the signal's rms, checksums and seal in order."""
    teacher, signal = group.split("/", 1)
    with Cache.open(store) as cache:
        entry = cache.teachers[teacher].signals[signal]
        values = cache.read(range(N), (), teacher, (signal,))[f"teacher/{signal}"]
        step = 0.01 * (entry.statistics.rms.max() if entry.spec.unit == "1" else 1.0)
        value = values.reshape(len(values), -1)[0, column] + step
    change(store, f"teachers/{group}", 0, column, float(value), code)
    assert verify(store).ok
    report = deep_verify(store, teacher=str(made / f"{teacher}.safetensors"))
    assert not report.ok
    assert {check.what for check in report.checks if not check.ok} == wrong
    if SUMS & wrong:
        found = {check.what for check in deep_verify(store).checks if not check.ok}
        assert found == SUMS & wrong
    check = next(check for check in report.checks if not check.ok)
    assert check.worst == f"{made / 'a.xyz'}#{Cache.open(store).source_row[0]}"
    assert f"{check.what}: 1 of " in report.text() or len(wrong) > 1
    assert "DEVIATES" in report.text()


def test_another_teacher_is_refused_with_both_hashes(made, tmp_path):
    other = write_teacher(tmp_path / "gemnet", "gemnet", seed=4)
    hashes = [
        load_teacher(str(p), device="cpu").info.weights_sha256 for p in (other, made / "gemnet.safetensors")
    ]
    with pytest.raises(CacheError, match=rf"has the weights of .*\({hashes[0]}\); .*gemnet has {hashes[1]}"):
        deep_verify(made / "s.kdcache", teacher=str(other))


def test_values_of_another_teacher_under_this_ones_name_are_found(made, tmp_path):
    """As if the weights file had been exchanged after its hash was taken."""
    store = make_store(tmp_path / "s.kdcache", made / "a.xyz")
    path = tmp_path / "t.safetensors"
    other = write_teacher(tmp_path / "other", seed=4)
    write_teacher(path)
    load = load_teacher(str(path), device="cpu").info.weights_sha256
    with pytest.MonkeyPatch.context() as patch:

        def lie(spec, **settings):
            teacher = load_teacher(str(other), **settings)
            object.__setattr__(teacher.info, "weights_sha256", load)
            return teacher

        patch.setattr("molkd.pipeline.caching.load_teacher", lie)
        cache_teacher(CacheConfig(store=store, teacher=str(path), name="t"))
    assert verify(store).ok
    assert deep_verify(store).ok
    report = deep_verify(store, teacher=str(path), n_systems=3)
    assert {c.what for c in report.checks if not c.ok} == {
        f"{s} = recomputed" for s in ("energy", "forces", "atomic_energies", "node")
    }


def test_other_edges_are_reported(made, monkeypatch):
    class Fewer:
        def __init__(self, teacher):
            self._teacher = teacher

        def __getattr__(self, name):
            return getattr(self._teacher, name)

        def compute(self, batch, signals):
            out = self._teacher.compute(batch, signals)
            if "edge" in out:
                out |= {"edge": out["edge"][1:], "edge_index": out["edge_index"][:, 1:]}
                out["edge_shift"] = out["edge_shift"][1:]
            return out

    monkeypatch.setattr(module, "load_teacher", lambda *a, **k: Fewer(load_teacher(*a, **k)))
    report = deep_verify(made / "s.kdcache", teacher=str(made / "painn.safetensors"), n_systems=2)
    assert not report.ok
    assert len(report.problems) == 2
    assert "1 edges are only in the store" in report.problems[0]
    assert "edge = recomputed" not in by_name(report, "painn")


def test_damaged_files_end_the_check(store):
    path = next(p for p in (store / "data.zarr/teachers/gemnet/node/values/c").rglob("0*") if p.is_file())
    path.write_bytes(path.read_bytes()[:-1])
    report = deep_verify(store)
    assert not report.ok
    assert report.checks == []
    assert "repair the files first" in report.text()


def test_shards_without_all_signals_are_left_out(store):
    (store / "manifest.json").unlink()
    (store / "log/teachers/gemnet/node/000000.json").unlink()
    report = deep_verify(store)
    assert report.ok
    assert report.systems["gemnet"] == []
    assert "no shard has all of its signals" in report.text()


def test_other_settings_are_noted(made, tmp_path):
    """The same weights file with another neighbour rule: values say what it changes, a note says why."""

    class Near:
        def __init__(self, teacher):
            self._teacher = teacher
            self.neighbor_rule = replace(teacher.neighbor_rule, cutoff=2.0)

        def __getattr__(self, name):
            return getattr(self._teacher, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_teacher", lambda *a, **k: Near(load_teacher(*a, **k)))
        report = deep_verify(made / "s.kdcache", teacher=str(made / "painn.safetensors"), n_systems=2)
    assert report.notes == ["painn: neighbor_rule.cutoff is 2.0, in the store 5.0"]
    assert not report.ok
