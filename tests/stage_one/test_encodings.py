"""Fitted encodings in stage one: chosen, fitted once, on the device or beside it, forecast, verified."""

from pathlib import Path

import numpy as np
import pytest
import torch
from stage_one_cases import assert_same_files, make_store, structures, write_extxyz, write_teacher

from molkd.cache_schema.fields import energy_spec, forces_spec, node_spec, v2v_spec
from molkd.cache_schema.fitting import calibration_systems
from molkd.cache_schema.layout import SCALE
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.writer import Store
from molkd.pipeline import encodings
from molkd.pipeline.budget import propose
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, make_config
from molkd.pipeline.deep_verify import deep_verify
from molkd.pipeline.device_narrowing import BROKEN, narrow_on_device, sums_of
from molkd.pipeline.encodings import CHOOSE, asked_encodings, choose_encoding, held_out_error
from molkd.pipeline.errors import CacheError, ConfigError
from molkd.pipeline.planning import parse_bytes, plan_teacher
from molkd.pipeline.shard_output import edge_rows
from molkd.pipeline.teacher_pass import make_work
from molkd.pipeline.teachers.load import load_teacher

SIGNALS = ("energy", "forces", "node", "v2v", "edge")
ENCODINGS = ("node=pca:4", "v2v=int8", "edge=pca:5")


def config(store, teacher, *signals, **settings):
    return CacheConfig(store=store, teacher=str(teacher), signals=signals or SIGNALS, **settings)


@pytest.fixture(scope="module")
def done(made, tmp_path_factory):
    """The same systems and signals, exact and in fitted encodings, from a GemNet-OC with random weights."""
    folder = tmp_path_factory.mktemp("encodings")
    data = write_extxyz(folder / "a.xyz", structures(150))
    teacher = write_teacher(folder / "gemnet", "gemnet")
    summaries = {}
    for name, encoding in (("exact", ("fp32",)), ("coded", ENCODINGS)):
        make_store(folder / f"{name}.kdcache", data)
        summaries[name] = cache_teacher(config(folder / f"{name}.kdcache", teacher, encoding=encoding))
    return folder, teacher, summaries


def read_all(store, signal):
    with Cache.open(store) as cache:
        (teacher,) = cache.teachers
        entry = cache.teachers[teacher].signals[signal]
        return cache.read(np.arange(cache.n_systems), (), teacher, (signal,))[f"teacher/{signal}"], entry


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_error_is_what_the_store_says(done, signal):
    folder, _, summaries = done
    exact, _ = read_all(folder / "exact.kdcache", signal)
    coded, entry = read_all(folder / "coded.kdcache", signal)
    error = np.abs(coded.astype(np.float64) - exact)
    if signal in ("energy", "forces"):
        assert error.max() == 0
        return
    assert (
        summaries["coded"].signals[signal] == entry.encoding == dict(e.split("=") for e in ENCODINGS)[signal]
    )
    assert error.max() == pytest.approx(entry.error_max_abs, rel=1e-4)
    assert 0 < entry.held_out_error_rms < exact.std()


def test_what_is_stored_is_smaller(done):
    folder, _, _ = done
    n_bytes = {
        name: sum(p.stat().st_size for p in (folder / f"{name}.kdcache").rglob("v2v/**/c/*/0/*"))
        for name in ("exact", "coded")
    }
    assert n_bytes["exact"] > 3.5 * n_bytes["coded"] > 0


def test_a_codebook_is_fitted_once(done, tmp_path, monkeypatch):
    folder, teacher, _ = done
    store = make_store(tmp_path / "s.kdcache", folder / "a.xyz")
    first = config(store, teacher, encoding=ENCODINGS)
    cache_teacher(first)
    monkeypatch.setattr(encodings, "fit_codebook", None)  # nobody fits again
    (store / "log/teachers/gemnet/node/000000.json").unlink()
    (store / "manifest.json").unlink()
    assert cache_teacher(first).n_computed > 0
    assert_same_files(store / "data.zarr", folder / "coded.kdcache" / "data.zarr")
    again = config(store, teacher, "node", max_error=1e-6)  # what is stored stays as it is
    assert cache_teacher(again).signals == {"node": "pca:4"}
    with pytest.raises(CacheError, match=r"node is stored as pca:4.*asked for fp32"):
        cache_teacher(config(store, teacher, "node", encoding="fp32"))


def test_narrowing_on_the_device_gives_the_same_store(done, tmp_path):
    """What a GPU does, on tensors in memory: every byte is that of the path beside the teacher."""
    folder, path, _ = done
    store = make_store(tmp_path / "s.kdcache", folder / "a.xyz")
    with Cache.open(folder / "coded.kdcache") as known, Cache.open(store) as cache:
        teacher = load_teacher(str(path), device=torch.device("cpu"), dtype=torch.float32)
        out = Store.open(store, "a")
        out.add_teacher("gemnet", known.teachers["gemnet"].provenance)
        signals = {s: known.signal("gemnet", s) for s in SIGNALS}
        groups = {s: out.add_signal("gemnet", x.spec, x.encoding, x.codebook) for s, x in signals.items()}
        atoms, edges = config(store, path).budget("cpu")
        for shard in out.missing_shards(groups["node"]):
            writers = {s: out.shard_writer(group, shard) for s, group in groups.items()}
            for writer in writers.values():
                writer.__enter__()
            systems = np.asarray(out.systems_of_shard(shard))
            for work in make_work(cache, systems, teacher.neighbor_rule, teacher.dtype, atoms, edges):
                given = teacher.compute(work.batch, SIGNALS)
                arrays = {k: v.numpy() for k, v in narrow_on_device(given, signals, work).items()}
                assert not arrays[BROKEN].any()
                for s, writer in writers.items():
                    rows = {"values": arrays[s]}
                    if f"{s}/{SCALE}" in arrays:
                        rows[SCALE] = arrays[f"{s}/{SCALE}"]
                    if s == "edge":
                        rows = edge_rows(rows, arrays["edge_index"], arrays["edge_shift"], work)
                    writer.write_narrowed(rows, {"values": sums_of(s, arrays)})
            for writer in writers.values():
                writer.__exit__(None, None, None)
        finalize(out)
    for s in SIGNALS:
        group = f"data.zarr/teachers/gemnet/{s}"
        assert_same_files(store / group, folder / "coded.kdcache" / group)
        ours, theirs = read_all(store, s)[1], read_all(folder / "coded.kdcache", s)[1]
        assert ours.error_rms == pytest.approx(theirs.error_rms, rel=1e-6)
        np.testing.assert_allclose(ours.statistics.mean, theirs.statistics.mean, rtol=1e-6, atol=1e-9)


def test_a_broken_system_is_named_whatever_its_rows(done):
    folder, path, _ = done
    with Cache.open(folder / "coded.kdcache") as cache:
        teacher = load_teacher(str(path), device=torch.device("cpu"), dtype=torch.float32)
        signals = {s: cache.signal("gemnet", s) for s in ("energy", "node", "edge")}
        (work,) = make_work(cache, np.arange(4), teacher.neighbor_rule, teacher.dtype, 1000, 10**6)
        given = teacher.compute(work.batch, tuple(signals))
        edges_of_2 = work.batch.system_idx[given["edge_index"][1]] == 2
        given["edge"][edges_of_2.nonzero()[0, 0], 1] = torch.nan
        given["energy"][0] = torch.inf
        arrays = narrow_on_device(given, signals, work)
        assert arrays[BROKEN].tolist() == [True, False, True, False]
        n = work.n_atoms[1] + work.n_atoms[3]
        assert sums_of("node", {k: v.numpy() for k, v in arrays.items()}).count == n
        assert arrays[f"node/{SCALE}"].isnan().sum() == work.n_atoms.sum() - n


def test_the_smallest_encoding_within_the_error_is_taken(done, tmp_path):
    folder, teacher, _ = done
    exact, _ = read_all(folder / "exact.kdcache", "v2v")
    last = 0
    for max_error in (0.5, 0.05, 5e-3, 1e-3, 1e-7):
        store = make_store(tmp_path / f"{max_error}.kdcache", folder / "a.xyz")
        chosen = cache_teacher(config(store, teacher, "energy", "v2v", max_error=max_error)).signals["v2v"]
        coded, entry = read_all(store, "v2v")
        error = np.sqrt(((coded - exact) ** 2).mean() / (exact.astype(np.float64) ** 2).mean())
        assert error < 1.3 * max_error  # it was measured on few systems
        assert entry.n_bytes >= last
        last = entry.n_bytes
    assert chosen == "fp32"


def test_choice_by_hand():
    """Two large components in 32 channels: 4 bytes hold them to 1e-4 or so, 8-bit codes do not."""
    rng = np.random.default_rng(0)
    mix = np.linalg.qr(rng.normal(size=(32, 32)))[0][:2]
    values = (rng.normal(size=(400, 2)) @ mix).astype(np.float32)
    spec = node_spec(32)
    assert held_out_error(values, spec, "pca:4", 200) < 3e-4
    assert held_out_error(values, spec, "int8", 200) > 3e-3
    assert choose_encoding(values, spec, 3e-4) == "pca:4"
    values = rng.normal(size=(400, 32)).astype(np.float32)  # rounding to 11 bits errs by 2e-4
    assert choose_encoding(values, spec, 3e-4) == "fp16"
    assert choose_encoding(values, spec, 1e-4) == "fp32"


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (("zip",), "choose fp32, fp16, int8 or pca:BYTES"),
        (("pca:0",), "choose fp32, fp16, int8 or pca:BYTES"),
        (("node=",), "choose fp32, fp16, int8 or pca:BYTES"),
        (("e2n=int8",), "e2n is not among the signals"),
    ],
)
def test_encodings_that_make_no_sense(done, encoding, message):
    folder, teacher, _ = done
    with pytest.raises(ConfigError, match=f"--encoding {encoding[0]}: .*{message}"):
        cache_teacher(config(folder / "coded.kdcache", teacher, "node", encoding=encoding))


def test_one_encoding_may_be_a_word():
    given = {"store": "s", "teacher": "t", "encoding": "int8"}
    assert make_config(CacheConfig, given).encoding == ("int8",)


def test_about_half_of_the_systems_are_held_out_at_least():
    assert len(calibration_systems(np.array([5]))) == 1
    assert len(calibration_systems(np.full(20, 10))) == 10
    assert len(calibration_systems(np.full(1000, 10))) == 205  # 2,048 atoms, more than a sixteenth
    assert len(calibration_systems(np.full(100_000, 75))) == -(-16_384 // 75)
    # Systems of very different size: enough rows first, then a system to measure the error on.
    assert len(calibration_systems(np.array([1, 4913]))) == 2
    assert len(calibration_systems(np.array([4913, 1]))) == 1
    assert len(calibration_systems(np.array([1500, 9000]))) == 1
    assert len(calibration_systems(np.array([1, 4913, 10]))) == 2


def test_values_are_verified_within_the_encodings_error(done):
    folder, teacher, _ = done
    report = deep_verify(folder / "coded.kdcache", teacher=str(teacher), n_systems=8)
    assert report.ok, report.problems
    names = {check.what for check in report.checks}
    assert {"node = recomputed", "edge = recomputed", "v2v = recomputed"} <= names
    other = write_teacher(folder / "other", "gemnet", seed=9)
    with pytest.raises(CacheError, match="none of its teachers has the weights"):
        deep_verify(folder / "coded.kdcache", teacher=str(other), n_systems=8)


def test_forecast_of_fitted_encodings(done, tmp_path):
    folder, teacher, _ = done
    store = make_store(tmp_path / "s.kdcache", folder / "a.xyz")
    asked = config(store, teacher, "energy", "node", "v2v", encoding=("int8", "v2v=pca:5"))
    price = plan_teacher(asked, store)
    assert price.encodings == {"energy": "fp64", "node": "int8", "v2v": "pca:5"}
    assert price.bytes_per_atom["node"] == 8 + 2
    assert price.bytes_per_atom["v2v"] == 3 * 5 + 2
    assert price.alternatives["v2v"]["fp32"] == 3 * 10 * 4
    text = price.text()
    assert "v2v" in text
    assert "fits" in text


@pytest.mark.parametrize(
    ("n_atoms", "given", "expected"),
    [
        (4096, {}, {"energy": "fp64", "forces": "fp32", "node": "int8", "v2v": "fp32"}),
        (4095, {}, {"energy": "fp64", "forces": "fp32", "node": "fp16", "v2v": "fp32"}),
        (10**9, {"encoding": ("fp16",)}, {"energy": "fp64", "forces": "fp32", "node": "fp16", "v2v": "fp16"}),
        (
            9999,
            {"encoding": ("node=pca:4",)},
            {"energy": "fp64", "forces": "fp32", "node": "pca:4", "v2v": "fp32"},
        ),
        (9999, {"max_error": 0.1}, {"energy": "fp64", "forces": "fp32", "node": CHOOSE, "v2v": CHOOSE}),
    ],
)
def test_what_is_taken_if_nothing_is_said(n_atoms, given, expected):
    """A store has v2v in fp32 already, node is new."""
    specs = {"energy": energy_spec(), "forces": forces_spec(), "node": node_spec(8), "v2v": v2v_spec(8)}
    config = CacheConfig(store=Path("x.kdcache"), teacher="t", signals=tuple(specs), **given)
    assert asked_encodings(specs, config, n_atoms, {"v2v": "fp32"}) == expected


@pytest.mark.parametrize(
    ("text", "n"), [("500GB", 500 * 10**9), ("1.5 tb", 1500 * 10**9), ("20000", 20_000), ("3k", 3000)]
)
def test_sizes_as_people_write_them(text, n):
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "5 elephants", "1e9"])
def test_no_size(text):
    with pytest.raises(ConfigError, match=f"{text}: is no size; write it as 500GB"):
        parse_bytes(text)


def test_a_budget_by_hand():
    """A million atoms: node of 256 and v2v of 3 x 256 channels beside 40 bytes of structures."""
    specs = {"energy": energy_spec(), "node": node_spec(256), "v2v": v2v_spec(256)}
    asked = {"energy": "fp64", "node": "fp16", "v2v": "fp16"}
    per_atom = {
        "node": {"fp16": 512, "pca:256": 258, "int8": 258, "pca:128": 130, "pca:64": 66, "pca:32": 34},
        "v2v": {"fp16": 1536, "pca:256": 770, "int8": 770, "pca:128": 386, "pca:64": 194, "pca:32": 98},
    }
    sizes = {s: {e: b * 1e6 for e, b in table.items()} for s, table in per_atom.items()}
    sizes["energy"] = {"fp64": 1e5}

    def within(budget):
        return propose(specs, asked, sizes, 40e6, int(budget))

    assert within(3e9).encodings == asked
    half = within(1.4e9)  # the widest goes down first: 40 + 512 + 770
    assert half.encodings == {"energy": "fp64", "node": "fp16", "v2v": "pca:256"}
    assert half.total_bytes == pytest.approx(1322.1e6)
    small = within(2e8)  # 40 + 34 + 98
    assert small.encodings == {"energy": "fp64", "node": "pca:32", "v2v": "pca:32"}
    assert not small.dropped
    tiny = within(1.2e8)  # without v2v node fits again in 66 bytes
    assert (tiny.dropped, tiny.encodings["node"]) == (("v2v",), "pca:64")
    assert tiny.flags == "--signals energy,node --encoding node=pca:64"
    assert not within(5e7).fits
