"""What encodings are fitted to, and what is chosen by its error: unusual data among them."""

from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from stage_one_cases import Shuffled, make_store, structures, write_extxyz, write_teacher

from molkd.cache_schema.codebook import encode_rows
from molkd.cache_schema.fields import energy_spec, forces_spec, node_spec, v2v_spec
from molkd.cache_schema.fitting import fit_codebook
from molkd.cache_schema.manifest import info
from molkd.cache_schema.reader import Cache
from molkd.pipeline import encodings
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.errors import CacheError, ConfigError
from molkd.pipeline.teacher_pass import TeacherPass
from molkd.pipeline.teachers.load import load_teacher


@pytest.fixture(scope="module")
def gemnet(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("fitting") / "gemnet", "gemnet")


def lonely(path):
    """Two isolated atoms: systems with rows on atoms and none on edges."""
    systems = [ase.Atoms("H", positions=[[0, 0, 0]]), ase.Atoms("O", positions=[[0, 0, 1]])]
    return make_store(path / "lonely.kdcache", write_extxyz(path / "lonely.xyz", systems))


def test_atoms_without_edges(gemnet, tmp_path):
    def cache(*signals, **settings):
        return cache_teacher(
            CacheConfig(store=lonely(tmp_path), teacher=str(gemnet), signals=signals, **settings)
        )

    with pytest.raises(CacheError, match="edge: no finite row to fit int8 to; choose fp16"):
        cache("node", "edge", encoding=("fp16", "edge=int8"))
    assert cache("node", "edge", encoding="fp16").signals == {"node": "fp16", "edge": "fp16"}


def test_systems_that_differ_in_size_are_stored_as_usual(gemnet, tmp_path):
    """The first system has one row: nothing varies in it."""
    settings = {"teacher": str(gemnet), "signals": ("node", "v2v"), "encoding": "int8"}
    summary = cache_teacher(CacheConfig(store=lonely(tmp_path), **settings))
    assert summary.signals == {"node": "int8", "v2v": "int8"}


def sample_of(path, teacher, signals, **settings):
    """Return rows and their systems, as `settle_encodings` sees them."""
    config = CacheConfig(store=path, teacher="t", signals=signals, **settings)
    with Cache.open(path) as cache:
        systems = np.arange(cache.n_systems)
        return encodings._compute(TeacherPass(teacher, cache), systems, signals, config)


def test_rows_are_by_system_whatever_the_order_of_edges(gemnet, tmp_path):
    store = make_store(tmp_path / "s.kdcache", write_extxyz(tmp_path / "a.xyz", structures(12)))
    teacher = load_teacher(str(gemnet), device=torch.device("cpu"), dtype=torch.float32)
    usual, systems = sample_of(store, teacher, ("node", "edge"))
    rows, owners = sample_of(store, Shuffled(teacher), ("node", "edge"))
    np.testing.assert_array_equal(owners["edge"], systems["edge"])
    assert (np.diff(owners["edge"]) >= 0).all()
    one = owners["edge"] == 5
    np.testing.assert_array_equal(np.sort(rows["edge"][one], axis=0), np.sort(usual["edge"][one], axis=0))


def test_many_edges_are_thinned_evenly_whatever_the_batches(gemnet, tmp_path, monkeypatch):
    store = make_store(tmp_path / "s.kdcache", write_extxyz(tmp_path / "a.xyz", structures(12)))
    teacher = load_teacher(str(gemnet), device=torch.device("cpu"), dtype=torch.float32)
    _, every = sample_of(store, teacher, ("node", "edge"))
    monkeypatch.setattr(encodings, "_MOST_ROWS", 120)
    rows, systems = sample_of(store, teacher, ("node", "edge"))
    np.testing.assert_array_equal(systems["node"], every["node"])  # fewer atoms than that
    with Cache.open(store) as cache:
        n_atoms = cache.system_n_atoms
    quota = np.ceil(120 * n_atoms / n_atoms.sum())
    n_edges = np.bincount(every["edge"], minlength=12)
    np.testing.assert_array_equal(np.bincount(systems["edge"], minlength=12), np.minimum(n_edges, quota))
    again, _ = sample_of(store, teacher, ("node", "edge"), batch_atoms=20)
    np.testing.assert_allclose(again["edge"], rows["edge"], atol=1e-5)


def test_spread_by_hand():
    kept = encodings._spread(np.array([0, 0, 0, 2, 2, 2, 2, 2]), np.array([9, 9, 2]))
    assert kept.tolist() == [True, True, True, False, False, True, False, True]


@pytest.mark.parametrize("spec", [node_spec(8), v2v_spec(8)])
@pytest.mark.parametrize("encoding", ["int8", "pca:3", "pca:16", "pca:100"])
def test_bytes_of_a_row_are_those_of_what_is_stored(spec, encoding):
    rows = np.random.default_rng(0).normal(size=(99, *spec.shape)).astype(np.float32)
    codes, scale = encode_rows(rows, fit_codebook(rows, spec, encoding, 1))
    assert encodings.row_bytes(spec, encoding) == codes[0].nbytes + scale[0].nbytes


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("energy=fp16", "energy=fp16: energy is stored in fp64, only features may be narrower; leave it out"),
        ("forces=int8", "forces=int8: forces is stored in fp32"),
        ("node=fp64", "node=fp64: choose fp32, fp16, int8 or pca:BYTES"),
        ("fp64", "fp64: choose fp32, fp16, int8 or pca:BYTES"),
    ],
)
def test_precision_that_a_signal_cannot_have(asked, message):
    specs = {"energy": energy_spec(), "forces": forces_spec(), "node": node_spec(8)}

    def ask(*encoding):
        config = CacheConfig(store=Path("x"), teacher="t", signals=tuple(specs), encoding=encoding)
        return encodings.asked_encodings(specs, config, 9999, {})

    with pytest.raises(ConfigError, match=f"--encoding {message}"):
        ask(asked)
    assert ask("int8", "forces=fp32") == {"energy": "fp64", "forces": "fp32", "node": "int8"}


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (lambda x: x, "fp16"),
        (lambda x: 100 + 0.1 * x, "fp32"),  # half precision has steps of 0.06 there
        (lambda x: 1e-7 * x, "fp32"),  # and of 6e-8 here
        (lambda x: 1e5 * x, "fp32"),  # and ends at 65504
        (lambda x: x[:1], "fp32"),  # an error is relative to nothing
        (lambda x: x[:0], "fp32"),
    ],
)
def test_half_precision_is_taken_only_where_it_is_good_enough(rows, chosen):
    values = np.random.default_rng(0).normal(size=(400, 32))
    assert encodings.choose_encoding(rows(values).astype(np.float32), node_spec(32), 1.5e-3) == chosen


def test_a_signal_stored_with_a_larger_error_is_named(gemnet, tmp_path, caplog):
    store = make_store(tmp_path / "s.kdcache", write_extxyz(tmp_path / "a.xyz", structures(60)))

    def cache(**settings):
        caplog.clear()
        signals = ("energy", "node", "v2v")
        cache_teacher(CacheConfig(store=store, teacher=str(gemnet), signals=signals, **settings))
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    assert cache(encoding=("pca:2", "node=int8")) == []
    assert cache(max_error=1.0) == []
    (warning,) = cache(max_error=0.05)
    entry = info(store)["teachers"]["gemnet"]["signals"]["v2v"]
    error = entry["held_out_error_rms"] / entry["deviation"]
    assert warning.startswith(f"v2v is stored in pca:2 with a relative error of {error:.2g}, more than")
    with Cache.open(store) as opened:
        known = opened.read(np.arange(60), (), "gemnet", ("node", "v2v"))
    described = info(store)["teachers"]["gemnet"]["signals"]
    deviation = np.sqrt(known["teacher/node"].var(axis=0, dtype=np.float64).mean())
    assert described["node"]["deviation"] == pytest.approx(deviation, rel=1e-5)
    rms = np.sqrt((known["teacher/v2v"].astype(np.float64) ** 2).mean())
    assert described["v2v"]["deviation"] == pytest.approx(rms, rel=1e-5)
