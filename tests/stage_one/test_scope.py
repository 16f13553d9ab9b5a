"""What a model was not made for is refused, wherever structures come from, before any work."""

import numpy as np
import pytest
from stage_one_cases import files, make_store, structures, write_extxyz

from molkd.cache_schema.reader import Cache
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import ModelError
from molkd.pipeline.evaluation.evaluate import known_systems
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.measuring import evaluate_model
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.planning import plan_teacher
from molkd.pipeline.scope import Scope

OPEN_SPACE = NeighborRule(cutoff=5.0, use_pbc=False)
PERIODIC = NeighborRule(cutoff=5.0)
ELEMENTS = frozenset({1, 6, 8})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Twelve systems, every fourth periodic, the ninth with nitrogen: a file and its store."""
    folder = tmp_path_factory.mktemp("mixed")
    systems = structures(12)
    systems[8].numbers[0] = 7
    make_store(folder / "m.kdcache", write_extxyz(folder / "m.xyz", systems))
    return folder


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """A model that ignores cells, for every element."""
    config = {"name": "schnet", "hidden_channels": 8, "num_filters": 8, "num_interactions": 1}
    config["use_pbc"] = False
    path = tmp_path_factory.mktemp("blind") / "blind.safetensors"
    Potential(build_model(config), LabelScale(), {"model": config}).save(path)
    return path


def test_the_first_misfit_of_a_store_is_named_by_its_file(mixed):
    with Cache.open(mixed / "m.kdcache") as cache:
        with pytest.raises(ModelError, match=r"m\.xyz#8: holds N \(atomic number 7\), which big was not"):
            Scope("big", ELEMENTS, PERIODIC).check_store(cache)
        with pytest.raises(ModelError, match=r"m\.xyz#(3|7|11): is periodic, and big ignores cells"):
            Scope("big", ELEMENTS | {7}, OPEN_SPACE).check_store(cache)
        Scope("big", ELEMENTS | {7}, PERIODIC).check_store(cache)
        rows = np.asarray(cache.source_row)
        molecules = np.flatnonzero(~cache.pbc.any(axis=1) & (rows != 8))
        Scope("big", ELEMENTS, OPEN_SPACE).check_store(cache, molecules)


@pytest.mark.parametrize(
    ("elements", "rule", "says"),
    [(ELEMENTS, PERIODIC, "#8: holds N"), (ELEMENTS | {7}, OPEN_SPACE, "#3: is periodic")],
)
def test_systems_of_a_file_are_checked_one_by_one(mixed, elements, rule, says):
    source = open_source(mixed / "m.xyz")
    with pytest.raises(ModelError, match=says):
        list(known_systems(source, Scope("big", elements, rule)))
    source.close()


def test_no_command_ignores_periodicity_silently(mixed, blind, tmp_path):
    before = files(mixed)
    asked = CacheConfig(store=mixed / "m.kdcache", teacher=str(blind), signals=("energy",))
    with pytest.raises(ModelError, match="is periodic, and blind ignores cells"):
        cache_teacher(asked)
    with pytest.raises(ModelError, match="is periodic, and blind ignores cells"):
        plan_teacher(asked, mixed / "m.kdcache")
    with pytest.raises(ModelError, match="is periodic, and blind ignores cells"):
        evaluate_model(str(blind), [mixed / "m.xyz"])
    assert files(mixed) == before
