"""Stage one: what is stored is what the teacher says of each system alone, whatever the batches were."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from stage_one_cases import (
    assert_same_files,
    files,
    make_store,
    one_batch,
    structures,
    write_extxyz,
    write_teacher,
)

from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store
from molkd.pipeline import caching
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.errors import CacheError, ConfigError, ModelError, TeacherError
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.planning import plan_teacher
from molkd.pipeline.teacher_pass import make_work
from molkd.pipeline.teachers.load import load_teacher

# Largest difference, in units of the signal's largest value, between a system in a batch and alone: rounding
# of sums in another order. Half precision rounds to 11 bits.
TOLERANCE = {("float64", "fp32"): 1e-7, ("float32", "fp32"): 1e-5, ("float32", "fp16"): 6e-4}


def config(store, teacher, *signals, **settings):
    return CacheConfig(store=store, teacher=str(teacher), signals=signals or ("energy", "node"), **settings)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Forty systems as a file and as a store."""
    folder = tmp_path_factory.mktemp("small")
    make_store(folder / "s.kdcache", write_extxyz(folder / "a.xyz", structures(40)))
    return folder


@pytest.fixture
def small_store(small, tmp_path):
    return shutil.copytree(small / "s.kdcache", tmp_path / "s.kdcache")


@pytest.mark.parametrize(
    ("kind", "precision", "encoding"),
    [
        ("painn-direct", "float64", "fp32"),
        ("painn-direct", "float32", "fp32"),
        ("painn-direct", "float32", "fp16"),
        ("painn-gradient", "float64", "fp32"),
        ("schnet", "float64", "fp32"),
        ("schnetpack", "float64", "fp32"),
    ],
)
def test_stored_signals_are_the_teachers_own(small_store, tmp_path, kind, precision, encoding):
    path = write_teacher(tmp_path / "t", kind)
    dtype = getattr(torch, precision)
    teacher = load_teacher(str(path), device="cpu", dtype=dtype)
    signals = tuple(teacher.signals)
    done = cache_teacher(
        config(small_store, path, *signals, precision=precision, encoding=encoding, batch_atoms=60)
    )
    assert (done.n_computed, done.bad_systems) == (40, [])
    originals = structures(40)
    with Cache.open(small_store, complete=True) as cache:
        stored = cache.read(np.arange(40), (), teacher="t", signals=signals)
        ends = np.cumsum(cache.system_n_atoms)
        alone: dict[str, list[np.ndarray]] = {s: [] for s in signals}
        for index in range(40):
            batch = one_batch(originals[int(cache.source_row[index])], teacher.neighbor_rule, dtype)
            found = teacher.compute(batch, signals)
            if "edge" in signals:
                own = cache.read([index], (), teacher="t", signals=("edge",))
                np.testing.assert_array_equal(own["teacher/edge/index"], found["edge_index"])
                np.testing.assert_array_equal(own["teacher/edge/shift"], found["edge_shift"])
            for name in signals:
                alone[name].append(found[name].numpy())
    assert len(signals) >= (5 if kind != "schnet" else 4)
    assert ends[-1] == sum(map(len, originals))
    for name in signals:
        expected, found = np.concatenate(alone[name]), stored[f"teacher/{name}"]
        assert found.shape == expected.shape
        exact = name in ("energy", "atomic_energies") and precision == "float64"
        tolerance = 1e-12 if exact else TOLERANCE[precision, encoding if name not in ("forces",) else "fp32"]
        scale = np.abs(expected).max()
        assert np.abs(found - expected).max() <= tolerance * scale, name
        assert (
            np.abs(expected - expected.mean(axis=0)).max() > 1e-3 * scale
        )  # rows differ, a mix-up would show


def test_batch_budgets(small_store):
    rule = NeighborRule(cutoff=5.0, max_neighbors=1000)
    with Cache.open(small_store) as cache:
        indices = np.arange(cache.n_systems)
        for max_atoms, max_edges in [(20, 10**9), (10**9, 300), (50, 200)]:
            works = list(make_work(cache, indices, rule, torch.float32, max_atoms, max_edges))
            np.testing.assert_array_equal(np.concatenate([w.indices for w in works]), indices)
            assert len(works) > 2
            for work in works:
                n_edges = work.batch.edge_index.shape[1]
                assert work.batch.n_atoms == cache.system_n_atoms[work.indices].sum()
                assert len(work.indices) == 1 or (work.batch.n_atoms <= max_atoms and n_edges <= max_edges)
            if max_atoms == 10**9:  # filled up: the next system's edges would not have fitted
                counts = [np.bincount(w.batch.system_idx[w.batch.edge_index[1]]) for w in works]
                assert all(c.sum() + n[0] > max_edges for c, n in pairwise(counts))
            if max_edges > 300:  # filled up: the next system would not have fitted
                first_of_next = cache.system_n_atoms[[w.indices[0] for w in works[1:]]]
                assert all(
                    w.batch.n_atoms + n > max_atoms for w, n in zip(works, first_of_next, strict=False)
                )


def test_a_system_larger_than_every_budget_still_runs(small_store, teacher_file):
    done = cache_teacher(config(small_store, teacher_file, batch_atoms=1, batch_edges=1))
    assert done.n_computed == 40
    assert verify(small_store).ok


def test_budgets_do_not_change_what_is_stored(small, teacher_file, tmp_path):
    stores = []
    for k, budget in enumerate((0, 30)):
        store = shutil.copytree(small / "s.kdcache", tmp_path / f"{k}")
        cache_teacher(config(store, teacher_file, precision="float64", batch_atoms=budget))
        stores.append(Cache.open(store))
    for name in ("energy", "node"):
        a, b = (c.read(np.arange(40), (), teacher="teacher", signals=(name,)) for c in stores)
        np.testing.assert_allclose(a[f"teacher/{name}"], b[f"teacher/{name}"], rtol=1e-3, atol=1e-12)


def test_another_signal_adds_only_itself(small_store, small, teacher_file, tmp_path):
    cache_teacher(config(small_store, teacher_file, "energy", "node"))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in small_store.rglob("*") if p.is_file()}
    done = cache_teacher(config(small_store, teacher_file, "node", "v2v", "layer/U1"))
    assert done.n_computed == 40
    after = {p for p in small_store.rglob("*") if p.is_file()}
    new = {p.relative_to(small_store).as_posix() for p in after - before.keys()}
    assert new
    assert all("teachers/teacher/v2v" in p or "teachers/teacher/layer" in p for p in new)
    manifest = small_store / "manifest.json"
    changed = {p for p, was in before.items() if (p.read_bytes(), p.stat().st_mtime_ns) != was}
    assert changed == {manifest}
    at_once = shutil.copytree(small / "s.kdcache", tmp_path / "at_once")
    cache_teacher(config(at_once, teacher_file, "energy", "node", "v2v", "layer/U1"))
    assert_same_files(small_store / "data.zarr", at_once / "data.zarr")
    again = cache_teacher(config(small_store, teacher_file, "energy", "node", "v2v"))
    assert (again.n_computed, again.bytes_written) == (0, 0)


def test_two_teachers_in_one_store(small_store, teacher_file, tmp_path):
    cache_teacher(config(small_store, teacher_file))
    content = files(small_store)
    other = write_teacher(tmp_path / "teacher", seed=4)  # same name, other weights
    with pytest.raises(
        CacheError, match=r"its teacher teacher is another one \(weights_sha256.*another name"
    ):
        cache_teacher(config(small_store, other))
    with pytest.raises(CacheError, match=r"another one .*precision"):
        cache_teacher(config(small_store, teacher_file, precision="float64"))
    with pytest.raises(CacheError, match=r"node .*stored as fp16.*asked for fp32"):
        cache_teacher(config(small_store, teacher_file, encoding="fp32"))
    assert files(small_store) == content
    cache_teacher(config(small_store, other, name="second"))
    assert sorted(Cache.open(small_store).teachers) == ["second", "teacher"]
    assert content.items() <= {**files(small_store), "manifest.json": content["manifest.json"]}.items()


def test_refused_before_any_work(small, small_store, tmp_path, monkeypatch):
    """A wrong question costs seconds, not a pass over the data, and leaves no trace."""
    content = files(small_store)
    for kind, signal in (("schnet", "v2v"), ("painn-direct", "layer/X9")):
        with pytest.raises(
            TeacherError, match=rf"gives no signal {signal}; it has atomic_energies, .*energy"
        ):
            cache_teacher(config(small_store, write_teacher(tmp_path / kind, kind), "energy", signal))
    systems = structures(30)
    systems[17].numbers[0] = 7
    strange = make_store(tmp_path / "strange", write_extxyz(tmp_path / "strange.xyz", systems))
    before = files(strange)
    with pytest.raises(ModelError, match=r"strange\.xyz#17: holds N .*which painn-direct was not made for"):
        cache_teacher(config(strange, tmp_path / "painn-direct.safetensors"))
    assert files(strange) == before
    assert files(small_store) == content


def test_unknown_signal_is_refused_before_data_are_ingested(small, tmp_path):
    teacher = write_teacher(tmp_path / "t", "schnet")
    asked = config(tmp_path / "new.kdcache", teacher, "energy", "v2v")
    with pytest.raises(TeacherError, match="gives no signal v2v"):
        cache_teacher(asked, small / "a.xyz")
    assert not (tmp_path / "new.kdcache").exists()


class Broken:
    """A teacher that says nonsense about some systems."""

    def __init__(self, teacher, positions, value):
        self._teacher, self._positions, self._value = teacher, positions, value

    def __getattr__(self, name):
        return getattr(self._teacher, name)

    def compute(self, batch, signals):
        out = self._teacher.compute(batch, signals)
        for system in range(batch.n_systems):
            first = int(batch.atoms_ptr[system])
            if any(torch.equal(batch.positions[first], p) for p in self._positions):
                out["node"][first, 1] = self._value
        return out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_output(small_store, teacher_file, monkeypatch, value):
    with Cache.open(small_store) as cache:
        bad = [5, 23]
        begin = np.concatenate([[0], np.cumsum(cache.system_n_atoms)])[bad]
        positions = torch.from_numpy(cache.read(np.arange(40), ("positions",))["positions"][begin])
        names = [f"{cache.source_names[0]}#{cache.source_row[i]}" for i in bad]
        n_atoms = cache.system_n_atoms[bad]
    monkeypatch.setattr(
        caching, "load_teacher", lambda *a, **k: Broken(load_teacher(*a, **k), positions, value)
    )
    asked = config(small_store, teacher_file, "energy", "node", batch_atoms=40)
    with pytest.raises(TeacherError, match=rf"{names[0]}: the teacher gives non-finite .*--skip-bad"):
        cache_teacher(asked)
    assert verify(small_store).ok
    assert Store.open(small_store).missing_shards("teachers/teacher/node") == [0]

    done = cache_teacher(config(small_store, teacher_file, "energy", "node", batch_atoms=40, skip_bad=True))
    assert done.bad_systems == names
    with Cache.open(small_store, complete=True) as cache:
        assert cache.bad_systems("teacher").tolist() == bad
        values = cache.read(np.arange(40), (), teacher="teacher", signals=("energy", "node"))
        assert np.flatnonzero(np.isnan(values["teacher/energy"])).tolist() == bad
        broken_rows = np.isnan(values["teacher/node"]).all(axis=1)
        assert broken_rows.sum() == n_atoms.sum()
        assert np.isfinite(values["teacher/node"][~broken_rows]).all()
    assert verify(small_store).ok


def test_store_given_as_data_is_used_as_it_is(small_store, teacher_file):
    asked = config(small_store, teacher_file)
    content = files(small_store)
    assert cache_teacher(asked, small_store).n_computed == 40
    after = files(small_store)
    assert [name for name in content if after[name] != content[name]] in ([], ["manifest.json"])


def test_data_without_a_store(small, teacher_file):
    data = small / "a.xyz"
    with pytest.raises(ConfigError, match=rf"{data}: is not a store; name one .*{data} NAME\.kdcache"):
        cache_teacher(config(data, teacher_file), data)


def test_structures_from_another_store(small_store, teacher_file, tmp_path):
    new = config(tmp_path / "new.kdcache", teacher_file)
    cache_teacher(new, small_store)
    assert Cache.open(new.store).fingerprint == Cache.open(small_store).fingerprint
    assert "teachers" not in {p.name for p in (small_store / "log").iterdir()}


@pytest.mark.parametrize("new_store", [True, False], ids=["new store", "signals added"])
def test_forecast_of_size_and_nothing_written(made, teacher_file, tmp_path, new_store):
    """Against the files that the real run then adds."""
    store = tmp_path / "s.kdcache"
    data = made / "train.extxyz"
    signals = ("energy", "forces", "node", "v2v")
    if not new_store:
        make_store(store, data, shard_atoms=2048)
        data = store
    before = files(tmp_path)
    asked = config(store, teacher_file, *signals)
    price = plan_teacher(asked, data)
    assert files(tmp_path) == before
    assert price.fits
    slowest = max(
        price.n_systems / price.teacher_systems_per_second,
        price.n_systems / price.graph_systems_per_second,
        price.total_bytes / price.write_bytes_per_second,
    )
    assert price.seconds == pytest.approx(slowest)
    cache_teacher(asked, data)
    added = sum(map(len, files(tmp_path).values())) - sum(map(len, before.values()))
    with Cache.open(store) as cache:
        assert price.n_systems == cache.n_systems
        assert price.n_atoms == pytest.approx(cache.n_atoms, rel=0.05)
    assert price.total_bytes == pytest.approx(added, rel=0.15)


def test_forecast_refuses_what_the_run_would_refuse(small, teacher_file, tmp_path):
    systems = structures(10)
    systems[6].numbers[0] = 7
    data = write_extxyz(tmp_path / "strange.xyz", systems)
    with pytest.raises(ModelError, match=r"strange\.xyz#6"):
        plan_teacher(config(tmp_path / "s", teacher_file), data)
    with pytest.raises(TeacherError, match="gives no signal q"):
        plan_teacher(config(tmp_path / "s", teacher_file, "q"), small / "a.xyz")
    with pytest.raises(ConfigError, match=r"a\.xyz: is not a store; name one"):
        plan_teacher(config(small / "a.xyz", teacher_file), small / "a.xyz")


def test_probe_reads_structures_of_a_store(small_store, teacher_file):
    assert len(StoreSource(Cache.open(small_store))) == 40
    price = plan_teacher(config(small_store, teacher_file, "energy", "node"), small_store)
    assert price.bytes_per_atom["node"] == 2 * 8  # 8 channels in half precision
    assert "structures" not in price.bytes_per_atom
