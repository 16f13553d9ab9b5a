"""Copies of a held-out system are held out too, whatever store they are in and however it was made."""

import logging
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from distill_cases import add_teacher, ids_of, make_store, train_config, write_part

from molkd.cache_schema.reader import Cache
from molkd.pipeline.augment.run import augment_rattle
from molkd.pipeline.config import CacheConfig, IngestConfig
from molkd.pipeline.config.augment import RattleConfig
from molkd.pipeline.data import lineage
from molkd.pipeline.data.lineage import knows_parents, root_ids
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.data.splits import split_mask
from molkd.pipeline.distill import train
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import CacheError
from molkd.pipeline.ingest import ingest
from molkd.pipeline.sharing.merging import merge_stores

SIGNALS = ("energy", "forces")
N, COPIES = 48, 2


def rattle(data: Path, store: Path, teacher: Path, **settings: object) -> Path:
    cache = CacheConfig(store=store, teacher=str(teacher), signals=SIGNALS, name="teacher")
    # Any structure is kept: the teacher's weights are random.
    free = {"max_force": 1e9, "min_contact": 0.0, "copies": COPIES}
    augment_rattle(RattleConfig(cache=cache, data=data, **(free | settings)))
    return store


@pytest.fixture(scope="module")
def stores(tmp_path_factory, teacher_file):
    folder = tmp_path_factory.mktemp("lineage")
    main = make_store(folder / "main.kdcache", write_part(folder / "main.extxyz", 0, N))
    add_teacher(main, teacher_file, signals=SIGNALS, name="teacher")
    return main, rattle(main, folder / "rattled.kdcache", teacher_file)


def trained_on(monkeypatch, config) -> set[bytes]:
    seen: set[bytes] = set()
    step = train.train_step

    def record(state, sample, *rest):
        seen.update(ids_of(sample))
        return step(state, sample, *rest)

    monkeypatch.setattr(train, "train_step", record)
    train_student(config)
    return seen


def as_set(rows) -> set[bytes]:
    return {row.tobytes() for row in rows}


def by_distance(cache: Cache, originals: Cache) -> list[bytes]:
    """Return for each system the id of the one with its atoms that lies nearest: without the store's word."""
    found = []
    ours, theirs = (
        [c.read([i], ("positions", "atomic_numbers")) for i in range(len(c))] for c in (cache, originals)
    )
    for one in ours:
        far = [
            np.abs(one["positions"] - other["positions"]).max()
            if np.array_equal(one["atomic_numbers"], other["atomic_numbers"])
            else np.inf
            for other in theirs
        ]
        assert min(far) < 0.4
        found.append(originals.ids[int(np.argmin(far))].tobytes())
    return found


def test_roots_are_the_systems_that_copies_lie_around(stores):
    main, rattled = (Cache.open(path) for path in stores)
    assert len(rattled) == N * COPIES
    assert [row.tobytes() for row in root_ids(rattled)] == by_distance(rattled, main)
    assert np.array_equal(root_ids(main), main.ids)


def test_copies_of_validation_systems_are_not_mixed_in(stores, tmp_path, monkeypatch, caplog):
    mix = [{"store": stores[1], "share": 0.5}]
    config = train_config(
        stores[0], tmp_path, kd=[{"name": "vanilla1"}], mix=mix, training={"max_steps": 60}, val_fraction=0.2
    )
    with caplog.at_level(logging.WARNING, "molkd"):
        seen = trained_on(monkeypatch, config)
    main, rattled = (Cache.open(path) for path in stores)
    val = as_set(main.ids[split_mask(main.ids, 0.2)])
    copies = {
        row.tobytes()
        for row, root in zip(rattled.ids, by_distance(rattled, main), strict=True)
        if root in val
    }
    assert 0 < len(copies) < N * COPIES
    assert seen == (as_set(main.ids) - val) | (as_set(rattled.ids) - copies)
    assert f"{len(copies)} systems of the store were made from validation or test data" in caplog.text


def test_copies_of_test_systems_are_not_mixed_in(stores, tmp_path, monkeypatch):
    test = write_part(tmp_path / "test.extxyz", 10, 20)
    mix = [{"store": stores[1], "share": 0.5}]
    changes = {"kd": [{"name": "vanilla1"}], "mix": mix, "val_fraction": 0.0, "test": {"test": test}}
    seen = trained_on(
        monkeypatch, train_config(stores[0], tmp_path / "run", training={"max_steps": 60}, **changes)
    )
    main, rattled = (Cache.open(path) for path in stores)
    held_out = {system.id for system in _systems(test)}
    copies = {
        row.tobytes()
        for row, root in zip(rattled.ids, by_distance(rattled, main), strict=True)
        if root in held_out
    }
    assert (len(held_out), len(copies)) == (10, 10 * COPIES)
    assert seen == (as_set(main.ids) - held_out) | (as_set(rattled.ids) - copies)


def test_merged_and_ingested_stores_split_copies_with_their_parents(stores, tmp_path):
    merged, ingested = tmp_path / "merged.kdcache", tmp_path / "ingested.kdcache"
    merge_stores(stores, merged)
    ingest(IngestConfig(data=stores, store=ingested))
    for path in (merged, ingested):
        cache = Cache.open(path)
        roots = root_ids(cache)
        parents = Cache.open(stores[0])
        assert [row.tobytes() for row in roots] == by_distance(cache, parents)
        val = split_mask(roots, 0.2)
        assert not as_set(roots[val]) & as_set(roots[~val])
        assert as_set(cache.ids[val]) & as_set(parents.ids) == as_set(
            parents.ids[split_mask(parents.ids, 0.2)]
        )


def test_copies_of_copies_go_back_to_the_first(stores, tmp_path, teacher_file):
    again = Cache.open(rattle(stores[1], tmp_path / "again.kdcache", teacher_file, sigma=(0.01,)))
    assert as_set(root_ids(again)) == as_set(Cache.open(stores[0]).ids)


def test_a_store_with_too_many_parents_to_keep_says_so(stores, tmp_path, teacher_file, monkeypatch, caplog):
    monkeypatch.setattr(lineage, "_MAX_BYTES", 100)
    rattled = rattle(stores[0], tmp_path / "many.kdcache", teacher_file)
    assert not knows_parents(Cache.open(rattled))
    merge_stores((stores[0], rattled), tmp_path / "merged.kdcache")
    assert not knows_parents(Cache.open(tmp_path / "merged.kdcache"))
    with monkeypatch.context() as patch:  # copies of such copies: their parents are known, not what those are
        patch.setattr(lineage, "_MAX_BYTES", 10**6)
        again = rattle(rattled, tmp_path / "again.kdcache", teacher_file, sigma=(0.01,))
    assert not knows_parents(Cache.open(again))
    mix = [{"store": rattled, "share": 0.5}]
    with caplog.at_level(logging.WARNING, "molkd"):
        train_student(
            train_config(
                stores[0], tmp_path / "run", kd=[{"name": "vanilla1"}], mix=mix, training={"max_steps": 2}
            )
        )
    assert "parents are not known" in caplog.text


@pytest.mark.parametrize(
    "known",
    [
        [],
        {"ids": ["ab"], "of": [0] * N},
        {"ids": ["00" * 16], "of": [1] * N},
        {"ids": ["00" * 16], "of": [-2] * N},
        {"ids": ["00" * 16], "of": [0]},
        {"ids": ["00" * 16], "of": [1e300] * N},
    ],
)
def test_senseless_parents_are_refused(tmp_path, known):
    data = write_part(tmp_path / "some.extxyz", 0, N)
    parents = {str(data): known}
    ingest(IngestConfig(data=(data,), store=tmp_path / "bad.kdcache", parents=parents))
    with pytest.raises(CacheError, match="parents"):
        root_ids(Cache.open(tmp_path / "bad.kdcache"))


def _systems(path):
    with closing(open_source(path)) as source:
        return [source.read(k) for k in range(len(source))]
