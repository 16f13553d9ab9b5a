"""Stores made to harm: verify finds it, each attempt is refused in one clear line, nothing else changes."""

import os

import numpy as np
import pytest
from hostile_attempts import ATTEMPTS, attempt, complaints, make_victim, read_all
from hostile_stores import cases

CASES = dict(cases())
ALWAYS = ("read", "verify")
OTHERS = [what for what in ATTEMPTS if what not in ALWAYS]
EACH = 3  # of the others a store
TRIED = {name: k for k, name in enumerate(CASES) if k % 5 in (0, 3)}  # the fault campaign takes all of them


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    path = tmp_path_factory.mktemp("victim") / "victim.kdcache"
    return path, make_victim(path)


def some_attempts(k: int) -> list[str]:
    """Return what is tried on the store of number `k`."""
    return [*ALWAYS, *(OTHERS[(EACH * k + j) % len(OTHERS)] for j in range(EACH))]


@pytest.mark.parametrize("family", sorted({name.split(" ")[0] for name in TRIED}))
def test_hostile_store_is_met_with_one_clear_error(family, victim, tmp_path):
    store, expected = victim
    wrong, n_tried = [], 0
    for name, k in TRIED.items():
        if name.split(" ")[0] == family:
            results = attempt(CASES[name], store, expected, tmp_path / "case", some_attempts(k))
            wrong += complaints(name, results)
            n_tried += len(results)
    assert n_tried
    assert not wrong, "\n".join(wrong)


def test_there_are_many_of_them():
    assert len(CASES) == len(list(cases())) > 300  # no two of one name
    assert len(TRIED) > 100
    assert {name.split(" ")[0] for name in TRIED} == {name.split(" ")[0] for name in CASES}


def test_a_good_store_passes_every_attempt(victim, tmp_path):
    """What is refused above is refused for what was changed."""
    store, expected = victim
    results = attempt(lambda store, outside: None, store, expected, tmp_path / "case")
    assert results == dict.fromkeys(ATTEMPTS, "ok")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda: np.ones(300 << 20, np.uint8).sum(), "MemoryError"),
        (lambda: os.read(os.pipe()[0], 1), "died of signal 14"),
        (lambda: os._exit(3), "died"),
    ],
)
def test_memory_time_and_the_child_are_watched(harm, said, victim, tmp_path, monkeypatch):
    monkeypatch.setitem(ATTEMPTS, "read", lambda scene: harm())
    monkeypatch.setattr("hostile_attempts.SECONDS", 0.5)
    results = attempt(lambda store, outside: None, *victim, tmp_path / "case", ["read"])
    assert said in results["read"]
    assert complaints("x", results | {"verify": "refused: this"})


def test_what_is_touched_outside_is_seen(victim, tmp_path, monkeypatch):
    monkeypatch.setitem(
        ATTEMPTS, "read", lambda scene: str((scene.store.parent / "outside/secret.txt").write_text("seen"))
    )
    results = attempt(lambda store, outside: None, *victim, tmp_path / "case", ["read"])
    assert results["outside"].startswith("WRONG")
    assert read_all(victim[0]).keys() == victim[1].keys()
