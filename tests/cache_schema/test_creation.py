"""What a store cannot be created from, and when it is not continued; nothing is left behind."""

import numpy as np
import pytest
from cache_example import create, make_example

from molkd.cache_schema import writer as writer_module
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.writer import create_store


def test_a_store_of_other_systems_is_not_continued(store, example):
    other = make_example([5, 300, 17], seed=8)
    with pytest.raises(
        CacheError, match=r"3 given systems are not in it \(a.extxyz#0.*12 of its systems are not given"
    ):
        create(store.path, other)


def test_a_store_with_other_labels_is_not_continued(store, example):
    changed = make_example([5, 300, 17, 1, 1024, 80, 700, 33, 512, 2, 90, 400], seed=7)
    changed.system["energy"][3] += 1e-9
    with pytest.raises(CacheError, match="1 of its systems have other energy labels"):
        create(store.path, changed)


def test_continuing_gives_the_mapping_for_the_new_input_order(store, example):
    order = np.arange(len(example.n_atoms))[::-1]
    reversed_ = example.reordered(order)
    again = create(store.path, reversed_)
    np.testing.assert_array_equal(again.input_index, len(order) - 1 - store.input_index)
    np.testing.assert_array_equal(again.systems.id, reversed_.ids[again.input_index])


def test_duplicates_are_named(tmp_path, example):
    twice = example.ids.copy()
    twice[4] = twice[1]
    with pytest.raises(CacheError, match=r"1 systems are given twice \(a.extxyz#2\)"):
        create(tmp_path / "x.kdcache", type(example)(example.n_atoms, example.system, {}, {}, twice))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("energy", np.inf, "infinite energy"),
        ("cell", np.nan, "cell that is not finite"),
    ],
)
def test_senseless_numbers_are_named(tmp_path, example, name, value, message):
    system = {k: v.copy() for k, v in example.system.items()}
    system[name][6] = value
    with pytest.raises(CacheError, match=f"a.extxyz#3.*{message}"):
        create(tmp_path / "x.kdcache", type(example)(example.n_atoms, system, {}, {}, example.ids))
    assert not list(tmp_path.iterdir())


def test_no_systems(tmp_path):
    with pytest.raises(CacheError, match="0 systems; a store needs at least one"):
        create(tmp_path / "x.kdcache", make_example_of_nothing())


def make_example_of_nothing():
    example = make_example([1])
    empty = {k: v[:0] for k, v in example.system.items()}
    return type(example)(example.n_atoms[:0], empty, {}, {}, example.ids[:0])


def test_a_folder_that_is_no_store_is_left_alone(tmp_path, example):
    (tmp_path / "x.kdcache").mkdir()
    (tmp_path / "x.kdcache" / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="exists and is not a store"):
        create(tmp_path / "x.kdcache", example)
    with pytest.raises(CacheError, match=r"not a store \(no plan.json"):
        Cache.open(tmp_path / "x.kdcache")
    with pytest.raises(CacheError, match="no such folder"):
        Cache.open(tmp_path / "y.kdcache")
    assert [p.name for p in tmp_path.rglob("*")] == ["x.kdcache", "notes.txt"]


def test_provenance_must_be_json(tmp_path, example):
    with pytest.raises(CacheError, match="plain JSON"):
        create_store(
            tmp_path / "x.kdcache",
            ids=example.ids,
            n_atoms=example.n_atoms,
            **example.system,
            source=np.zeros(12),
            source_row=np.arange(12),
            source_names=["a"],
            dataset={"mean": float("nan")},
        )
    assert not list(tmp_path.iterdir())


def test_two_creators_at_once_share_one_store(tmp_path, example, monkeypatch):
    """The other process finishes its store while ours is being built."""
    path = tmp_path / "x.kdcache"
    build = writer_module.build

    def slow(*arguments):
        monkeypatch.setattr(writer_module, "build", build)
        create(path, example)
        return build(*arguments)

    monkeypatch.setattr(writer_module, "build", slow)
    store = create(path, example)
    assert [p.name for p in tmp_path.iterdir()] == ["x.kdcache"]
    np.testing.assert_array_equal(store.systems.id, example.ids[store.input_index])
