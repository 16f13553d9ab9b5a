"""Signals on edges in stage one: whatever order the teacher gives them in, they are stored by system."""

import shutil

import numpy as np
import pytest
import torch
from stage_one_cases import Shuffled, files, make_store, one_batch, structures, write_extxyz, write_teacher

from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.pipeline import caching
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.models.painn import PaiNN
from molkd.pipeline.planning import plan_teacher
from molkd.pipeline.teachers.load import load_teacher

ROUNDING = 1e-5  # of float32 sums in another order, relative to the largest value
N = 24


def config(store, teacher, *signals, **settings):
    return CacheConfig(store=store, teacher=str(teacher), signals=signals, **settings)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    make_store(folder / "s.kdcache", write_extxyz(folder / "a.xyz", structures(N)))
    write_teacher(folder / "gemnet", "gemnet")
    write_teacher(folder / "painn")
    return folder


@pytest.fixture
def store(small, tmp_path):
    return shutil.copytree(small / "s.kdcache", tmp_path / "s.kdcache")


def by_edge(index, shift, values):
    """Edges as a table, so that two lists in different orders compare."""
    return {
        (*ends, *image): row
        for ends, image, row in zip(
            np.asarray(index).T.tolist(),
            np.asarray(shift).astype(int).tolist(),
            np.asarray(values),
            strict=True,
        )
    }


@pytest.mark.parametrize("kind", ["gemnet", "painn"])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_edges_are_those_of_each_system_alone(small, store, kind, order, monkeypatch):
    path = small / f"{kind}.safetensors"
    teacher = load_teacher(str(path), device="cpu")
    if order == "shuffled":
        monkeypatch.setattr(caching, "load_teacher", lambda *a, **k: Shuffled(teacher))
    cache_teacher(config(store, path, "edge", encoding="fp32", batch_atoms=50))
    assert verify(store).ok
    originals = structures(N)
    with Cache.open(store, complete=True) as cache:
        for index in range(N):
            batch = one_batch(originals[int(cache.source_row[index])], teacher.neighbor_rule, torch.float32)
            out = teacher.compute(batch, ["edge"])
            own = cache.read([index], (), teacher=kind, signals=("edge",))
            found = by_edge(own["teacher/edge/index"], own["teacher/edge/shift"], own["teacher/edge"])
            expected = by_edge(out["edge_index"], out["edge_shift"], out["edge"])
            assert found.keys() == expected.keys()
            scale = max(abs(row).max() for row in expected.values())
            assert max(abs(found[k] - expected[k]).max() for k in expected) <= ROUNDING * scale
        edges = cache.teachers[kind].signals["edge"]
        assert (
            edges.n_rows
            == edges.statistics.count
            == cache.read(range(N), (), kind, ("edge",))["teacher/edge/n_edges"].sum()
        )


def test_e2n_and_v2v_are_aggregates_of_the_stored_edges(small, store):
    """Eqs. 5 and 6 from what is in the store, with a plain loop over edges."""
    cache_teacher(config(store, small / "gemnet.safetensors", "all", "edge", encoding="fp32"))
    with Cache.open(store) as cache:
        arrays = cache.read(range(N), ("positions", "cell"), "gemnet", ("edge", "e2n", "v2v"))
    e2n, v2v = (np.zeros_like(arrays[f"teacher/{name}"], dtype=np.float64) for name in ("e2n", "v2v"))
    owner = np.repeat(np.arange(N), arrays["n_atoms"])
    columns = (arrays["teacher/edge/index"].T, arrays["teacher/edge/shift"], arrays["teacher/edge"])
    for (sender, receiver), shift, x in zip(*columns, strict=True):
        image = arrays["positions"][sender] + shift @ arrays["cell"][owner[sender]]
        vector = arrays["positions"][receiver] - image
        e2n[receiver] += x
        v2v[receiver] += np.outer(vector / np.linalg.norm(vector), x)
    for name, sums in (("e2n", e2n), ("v2v", v2v)):
        stored = arrays[f"teacher/{name}"]
        assert np.abs(stored).max() > 1e-3
        np.testing.assert_allclose(stored, sums, atol=ROUNDING * np.abs(stored).max())


def test_vectors_of_layers_are_stored_where_they_are_asked_for(small, store):
    """`all` leaves them out; those of the last update block are the model's v2v."""
    path = small / "painn.safetensors"
    done = cache_teacher(config(store, path, "all", encoding="fp32"))
    vectors = {
        name for name, s in load_teacher(str(path), device="cpu").signals.items() if s.symmetry == "vector"
    }
    assert {"layer/MV1", "layer/UV1"} < vectors
    assert set(done.signals) & vectors == {"forces", "v2v"}
    last = max(name for name in vectors if name.startswith("layer/UV"))
    cache_teacher(config(store, path, last, "layer/MV1", encoding="fp32"))
    with Cache.open(store, complete=True) as cache:
        arrays = cache.read(range(N), (), "painn", ("v2v", last, "layer/MV1"))
    np.testing.assert_array_equal(arrays[f"teacher/{last}"], arrays["teacher/v2v"])
    assert np.abs(arrays["teacher/layer/MV1"] - arrays["teacher/v2v"]).max() > 1e-3


def test_all_means_every_signal_but_raw_edges(small, store):
    done = cache_teacher(config(store, small / "gemnet.safetensors", "all"))
    expected = {"energy", "forces", "atomic_energies", "node", "e2n", "v2v"}
    expected |= {f"layer/{tap}" for tap in ("H0", "H1", "X0", "X1")}
    assert set(done.signals) == expected
    done = cache_teacher(config(store, small / "gemnet.safetensors", "all", "edge"))
    assert set(done.signals) == expected | {"edge"}
    assert done.bytes_written == sum(
        len(raw) for name, raw in files(store / "data.zarr").items() if "/edge/" in name and "/c/" in name
    )


def test_forecast_of_edges_is_what_they_then_occupy(small, store, tmp_path):
    asked = config(store, small / "gemnet.safetensors", "energy", "edge", batch_atoms=100)
    price = plan_teacher(asked, store)
    cache_teacher(asked)
    with Cache.open(store) as cache:
        edges = cache.teachers["gemnet"].signals["edge"]
        # Whole chunks of 1,024 rows are stored, their index, and places for systems.
        rows = edges.n_rows / cache.n_atoms
    assert price.edges_per_atom == pytest.approx(rows)
    assert price.bytes_per_atom["edge"] == pytest.approx(
        rows * (10 * 2 + 2 * 4 + 3 * 2) + 4 * N / cache.n_atoms
    )


@pytest.mark.parametrize("bad", [0, 7])
def test_a_system_with_a_broken_edge_is_given_up(small, store, monkeypatch, bad):
    path = small / "painn.safetensors"
    with Cache.open(store) as cache:
        first = torch.from_numpy(cache.read([bad], ("positions",))["positions"][0])

    class Broken(Shuffled):
        def compute(self, batch, signals):
            out = self._teacher.compute(batch, signals)
            atom = (batch.positions == first).all(1).nonzero().flatten()
            out["edge"][torch.isin(out["edge_index"][1], atom), 2] = float("nan")
            return out

    monkeypatch.setattr(caching, "load_teacher", lambda *a, **k: Broken(load_teacher(*a, **k)))
    cache_teacher(config(store, path, "energy", "edge", skip_bad=True, batch_atoms=60))
    assert verify(store).ok
    with Cache.open(store, complete=True) as cache:
        assert cache.bad_systems("painn").tolist() == [bad]
        values = cache.read(range(N), (), "painn", ("edge",))
        ends = np.cumsum(values["teacher/edge/n_edges"])
        lost = np.zeros(len(values["teacher/edge"]), dtype=bool)
        lost[ends[bad] - values["teacher/edge/n_edges"][bad] : ends[bad]] = True
        np.testing.assert_array_equal(np.isnan(values["teacher/edge"]).all(axis=1), lost)
        np.testing.assert_array_equal(np.isnan(values["teacher/edge"]).any(axis=1), lost)


@pytest.mark.parametrize("kind", ["painn-direct", "painn-gradient", "schnet", "gemnet"])
def test_forces_are_not_computed_unless_asked(small, kind, tmp_path, monkeypatch):
    teacher = load_teacher(str(write_teacher(tmp_path / "t", kind)), device="cpu")
    batch = one_batch(structures(1)[0], teacher.neighbor_rule, torch.float32)
    expected = teacher.compute(batch, ["energy", "forces", "node"])

    def refuse(*args, **kwargs):
        raise AssertionError("forces were computed")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    model = teacher.potential.model
    for head in ("out_forces", "out_mlp_F"):
        if hasattr(model, head):
            monkeypatch.setattr(getattr(model, head), "forward", refuse)
    out = teacher.compute(batch, ["energy", "node"])
    for name in ("energy", "node"):
        torch.testing.assert_close(out[name], expected[name])
    with pytest.raises(AssertionError, match="forces were computed"):
        teacher.compute(batch, ["forces"])


def test_edge_of_painn_is_the_product_of_its_ends(small):
    teacher = load_teacher(str(small / "painn.safetensors"), device="cpu", dtype=torch.float64)
    assert isinstance(teacher.potential.model, PaiNN)
    batch = one_batch(structures(4)[3], teacher.neighbor_rule, torch.float64)
    out = teacher.compute(batch, ["v2v", "edge"])
    torch.testing.assert_close(out["edge_index"], batch.edge_index)
    for k in (0, 5, -1):
        i, j = out["edge_index"][:, k].tolist()
        torch.testing.assert_close(out["edge"][k], torch.einsum("xc,xc->c", out["v2v"][i], out["v2v"][j]))
