"""A store of format 1, written once and kept, is read by every later version."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_example import tree_digest
from golden_v1 import EDGES, NUMBERS, POSITIONS, PROVENANCE, make

from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify

DATA = Path(__file__).parents[1] / "data"
FINGERPRINT = "9bd71a212420440ef533de56c022c4c1bc93e6134f54b44b8c52b8f79e1dd98a"
IDS = [
    "3dbb4d3fb8d06ab53d11a88a4a24a1ed",
    "d46208349f8b7f58c0ee48fd147398db",
    "dc9da6a7f8ebf9399c32fb4c1b9dc709",
]


@pytest.fixture(params=["golden_v1", "golden_v1_edges", "golden_v1_fitted"])
def name(request):
    return request.param


@pytest.fixture(params=["manifest", "records"])
def golden(request, name, tmp_path):
    path = shutil.copytree(DATA / f"{name}.kdcache", tmp_path / f"{name}.kdcache")
    if request.param == "records":
        (path / "manifest.json").unlink()
    return path


def test_it_is_sound(golden):
    report = verify(golden)
    assert report.ok
    assert report.notes == []


def test_it_holds_what_it_held(golden):
    with Cache.open(golden, complete=True) as cache:
        assert (cache.n_systems, cache.n_atoms) == (3, 5)
        assert cache.fingerprint == FINGERPRINT
        assert [bytes(one).hex() for one in cache.ids] == IDS
        sources = zip(cache.source, cache.source_row, strict=True)
        where = {(cache.source_names[s], int(row)): i for i, (s, row) in enumerate(sources)}
        water, hydrogen, copper = (
            where[key] for key in (("molecules.extxyz", 0), ("molecules.extxyz", 1), ("copper.extxyz", 0))
        )
        assert cache.bad_systems("golden").tolist() == [hydrogen]
        assert cache.teachers["golden"].provenance == PROVENANCE
        arrays = cache.read([copper, water], teacher="golden", signals=("node", "v2v", "energy"))
        assert arrays["n_atoms"].tolist() == [1, 3]
        assert arrays["atomic_numbers"].tolist() == [*NUMBERS[2], *NUMBERS[0]]
        np.testing.assert_array_equal(arrays["positions"], np.float32([*POSITIONS[2], *POSITIONS[0]]))
        np.testing.assert_array_equal(arrays["energy"], [np.nan, -14.25])
        np.testing.assert_array_equal(arrays["forces"], [[np.nan] * 3] + [[0.5] * 3] * 3)
        assert arrays["tags"].tolist() == [2, 0, 0, 0]
        assert arrays["fixed"].tolist() == [False, False, True, False]
        np.testing.assert_array_equal(
            arrays["cell"][0], np.float32([[0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0]])
        )
        assert arrays["pbc"].tolist() == [[True] * 3, [False] * 3]
        # 0.1 in binary16 is 0x2E66 = 0.0999755859375
        np.testing.assert_array_equal(
            arrays["teacher/node"], [[0.0999755859375, 2]] + [[0.0999755859375, 0]] * 3
        )
        np.testing.assert_array_equal(arrays["teacher/v2v"][:, :, 0], arrays["positions"])
        assert arrays["teacher/energy"].tolist() == [2.1, 0.1]
        assert np.isnan(cache[hydrogen]["golden/node"]).all()
        statistics = cache.teachers["golden"].signals["node"].statistics
        np.testing.assert_array_equal(statistics.mean, [0.0999755859375, 0.5])
        np.testing.assert_array_equal(statistics.variance[1:], [0.75])


@pytest.mark.parametrize("name", ["golden_v1_edges"])
def test_it_holds_its_edges(golden):
    with Cache.open(golden, complete=True) as cache:
        water, copper = np.flatnonzero(cache.system_n_atoms == 3), np.flatnonzero(cache.pbc.all(axis=1))
        arrays = cache.read([*copper, *water], (), "golden", ("edge",))
        assert arrays["teacher/edge/n_edges"].tolist() == [2, 4]
        assert arrays["teacher/edge/index"].T.tolist() == [[0, 0], [0, 0], [2, 1], [3, 1], [1, 2], [1, 3]]
        assert arrays["teacher/edge/shift"].tolist() == [[1, 0, 0], [-1, 0, 0], *[[0, 0, 0]] * 4]
        expected = np.float16([edge[3] for edge in EDGES[2] + EDGES[0]]).astype(np.float32)
        np.testing.assert_array_equal(arrays["teacher/edge"][:, 0], expected)


@pytest.mark.parametrize("name", ["golden_v1_fitted"])
def test_it_holds_its_coded_signals(golden):
    """Codes by hand: see the functions that made them."""
    with Cache.open(golden, complete=True) as cache:
        copper = np.flatnonzero(cache.pbc.all(axis=1))
        stored = cache.read(copper, (), "golden", ("layer/coded", "layer/rotated"), decode=False)
        values = cache.read(copper, (), "golden", ("layer/coded", "layer/rotated"))
    assert stored["teacher/layer/coded"].tolist() == [[127, 20]]
    assert stored["teacher/layer/rotated"].tolist() == [[[127, 0xE7], [0, 0], [0, 0]]]  # 7 and -2
    scale = 1025 / 1024
    assert stored["teacher/layer/rotated/scale"].tolist() == [scale]
    # The basis turns the components to channels 1, 2, 0.
    along_x = [-2 * scale, 127 * scale, 7 * scale]
    assert values["teacher/layer/rotated"].tolist() == [[along_x, [0] * 3, [0] * 3]]
    assert values["teacher/layer/coded"].tolist() == [[1 + 0.5 * 127 * scale, 0.25 * 20 * scale]]


def test_todays_writer_makes_the_same_bytes(name, tmp_path):
    """If this fails the format changed: raise its number, keep reading format 1, add a golden store."""
    make(tmp_path / "x.kdcache", edges=name.endswith("edges"), fitted=name.endswith("fitted"))
    ours, kept = tree_digest(tmp_path / "x.kdcache"), tree_digest(DATA / f"{name}.kdcache")
    assert ours.keys() == kept.keys()
    # Commit records name time and writer; the manifest holds sums, whose last bits depend on the machine.
    differing = {name for name in kept if ours[name] != kept[name]}
    assert not {name for name in differing if not name.startswith(("log/", "manifest.json"))}
