"""The forecast against the store as it is, and against what a real run then adds to it."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from stage_one_cases import make_store, structures, write_extxyz, write_teacher

from molkd.cache_schema.encoding import is_fitted
from molkd.cache_schema.fields import node_spec
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.untrusted import n_bytes_below
from molkd.pipeline import forecast, forecast_text
from molkd.pipeline.budget import Proposal
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.errors import CacheError
from molkd.pipeline.planning import plan_teacher, usual_store

SIGNALS = ("energy", "forces", "node")


def asked(store, teacher, *signals, **settings):
    return CacheConfig(store=store, teacher=str(teacher), signals=signals or SIGNALS, **settings)


@pytest.fixture
def finished(store, teacher_file):
    """A store of 320 systems in two shards with energy, forces and node in fp16."""
    cache_teacher(asked(store, teacher_file))
    return store


def test_what_is_stored_is_not_priced_again(finished, teacher_file):
    price = plan_teacher(asked(finished, teacher_file), finished)
    assert (price.total_bytes, price.n_systems_to_do, price.seconds) == (0, 0, 0)
    assert set(price.bytes_to_write.values()) == {0}
    assert price.alternatives == {}
    assert price.fits
    assert "0 systems lack signals" in price.text()
    with Cache.open(finished) as cache:
        assert price.n_atoms == cache.n_atoms  # of 320 systems, of which 256 were looked at
    more = plan_teacher(asked(finished, teacher_file, *SIGNALS, "v2v"), finished)
    assert (more.n_systems_to_do, more.bytes_to_write["node"]) == (320, 0)
    assert list(more.alternatives) == ["v2v"]


def test_shards_that_are_missing_are_priced(finished, teacher_file):
    (finished / "log/teachers/teacher/node/000001.json").unlink()
    (finished / "manifest.json").unlink()
    price = plan_teacher(asked(finished, teacher_file), finished)
    with Cache.open(finished) as cache:
        shard = np.asarray(cache.systems.in_shard(1))
        n_atoms = cache.system_n_atoms[shard].sum()
    assert price.n_systems_to_do == len(shard)
    assert price.bytes_to_write == {"energy": 0, "forces": 0, "node": n_atoms * 8 * 2}
    assert 0 < price.total_bytes < 40_000


def test_what_the_real_run_refuses(finished, teacher_file, tmp_path):
    for encoding in ("fp32", "node=int8"):
        config = asked(finished, teacher_file, encoding=encoding)
        refusal = rf"node is stored as fp16 \(8,\), asked for {encoding.split('=')[-1]} \(8,\); ask for what"
        with pytest.raises(CacheError, match=refusal):
            plan_teacher(config, finished)
        with pytest.raises(CacheError, match=r"node is stored as fp16"):
            cache_teacher(config)
    assert plan_teacher(asked(finished, teacher_file, max_error=1e-7), finished).encodings["node"] == "fp16"
    other = write_teacher(tmp_path / "teacher", seed=8)
    with pytest.raises(CacheError, match=r"its teacher teacher is another one"):
        plan_teacher(asked(finished, other), finished)
    strangers = write_extxyz(tmp_path / "b.xyz", structures(5, seed=9))
    with pytest.raises(
        CacheError, match=r"holds other systems, .*b\.xyz#\d+ is not among them; name another"
    ):
        plan_teacher(asked(finished, teacher_file), strangers)


def test_a_budget_is_for_all_that_the_store_holds(finished, teacher_file):
    config = asked(finished, teacher_file, *SIGNALS, "v2v")
    held = n_bytes_below(finished)
    assert not plan_teacher(config, finished, budget=held).proposal.encodings.keys() - set(SIGNALS)
    price = plan_teacher(config, finished, budget=10**9)
    assert price.proposal.total_bytes == pytest.approx(held + price.total_bytes, abs=1)
    tight = plan_teacher(config, finished, budget=price.proposal.total_bytes - 10_000).proposal
    assert tight.fits
    assert tight.encodings["node"] == "fp16"  # is stored and stays
    assert tight.encodings["v2v"] != "fp16"


@pytest.mark.parametrize("is_store", [True, False])
@pytest.mark.parametrize("encoding", ["fp16", "int8", "pca:4"])
def test_size_forecast_of_small_stores(made, teacher_file, tmp_path, is_store, encoding):
    """A few hundred systems, where fill and metadata are most of it."""
    data = made / "train.extxyz"
    store = tmp_path / "s.kdcache"
    if is_store:
        data = make_store(store, data)
    before = n_bytes_below(store) if is_store else 0
    config = asked(store, teacher_file, *SIGNALS, "v2v", encoding=encoding)
    price = plan_teacher(config, data)
    assert sum(price.bytes_to_write.values()) + price.overhead_bytes == pytest.approx(price.total_bytes)
    cache_teacher(config, data)
    assert price.total_bytes == pytest.approx(n_bytes_below(store) - before, rel=0.15)


def relative_error(store, signal):
    """What the store says of systems that nothing was fitted to, over the deviation about the mean."""
    with Cache.open(store) as cache:
        entry = cache.teachers["teacher"].signals[signal]
        values = cache.read(np.arange(cache.n_systems), (), "teacher", (signal,))[f"teacher/{signal}"]
    error = entry.held_out_error_rms if is_fitted(entry.encoding) else entry.error_rms
    return error / np.sqrt(((values - (0 if values.ndim == 3 else values.mean(axis=0))) ** 2).mean())


@pytest.mark.parametrize("share", [0.9, 0.7, 0.55])
def test_a_proposal_keeps_to_the_budget(made, teacher_file, tmp_path, share):
    store = make_store(tmp_path / "s.kdcache", made / "train.extxyz")
    config = asked(store, teacher_file, *SIGNALS, "v2v", "layer/M1", encoding="fp32")
    full = plan_teacher(config, store, budget=10**9).proposal
    assert set(full.encodings.values()) == {"fp64", "fp32"}
    assert full.flags.endswith("--encoding node=fp32 --encoding v2v=fp32 --encoding layer/M1=fp32")
    budget = int(full.total_bytes * share)
    found = plan_teacher(config, store, budget=budget).proposal
    assert found.fits
    words = found.flags.split()
    encoding = tuple(b for a, b in pairwise(words) if a == "--encoding")
    cache_teacher(asked(store, teacher_file, *words[1].split(","), encoding=encoding))
    assert n_bytes_below(store) <= budget
    for signal, said in found.errors.items():
        assert said == pytest.approx(relative_error(store, signal), rel=0.3, abs=1e-9)


def test_a_proposal_that_cannot_hold_the_values():
    said = Proposal({"node": "fp16"}, 1000, (), True, "--signals node", {"node": None, "v2v": 0.0123})
    assert "node cannot hold its values, v2v 1.2 %" in "\n".join(forecast_text._proposal_lines(said))
    rows = np.full((10, 4), 1e6, dtype=np.float32)
    assert forecast._errors({"node": rows}, {"node": node_spec(4)}, {"node": "fp16"}) == {"node": None}
    assert forecast._errors({"node": rows[:0]}, {"node": node_spec(4)}, {"node": "int8"}) == {}


def test_nothing_is_written_into_the_store(finished, teacher_file, monkeypatch):
    """The disk is measured beside it; where that is not possible the rest of the price is still there."""
    folders = []
    monkeypatch.setattr(forecast, "write_bandwidth", folders.append)
    price = plan_teacher(asked(finished, teacher_file, "v2v"), finished)
    assert folders == [finished.parent]
    assert price.write_bytes_per_second is None
    assert price.seconds > 0
    assert "the disk's speed is unknown" in price.text()


def test_where_signals_go_if_nothing_is_said(finished, made):
    assert usual_store(finished) == finished
    assert usual_store(made / "train.extxyz") == Path("train.kdcache")
    assert usual_store("s3://bucket/lab/oc20.kdcache") == Path("oc20.kdcache")
