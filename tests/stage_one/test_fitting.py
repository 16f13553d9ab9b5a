"""What encodings are fitted to, and what is chosen by its error: unusual data among them."""

import ase
import pytest
from stage_one_cases import make_store, write_extxyz, write_teacher

from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.errors import CacheError


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
