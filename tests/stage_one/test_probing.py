"""The probe of teacher and disk: what is unusual about data or machine does not stop it."""

import ase
import numpy as np
import pytest
import torch
from stage_one_cases import make_store, structures, write_extxyz, write_teacher

from molkd.pipeline import probing
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.planning import plan_teacher
from molkd.pipeline.probing import probe_teacher, write_bandwidth
from molkd.pipeline.teachers.load import load_teacher


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A GemNet-OC with random weights, and 40 systems."""
    folder = tmp_path_factory.mktemp("probing")
    path = write_teacher(folder / "gemnet", "gemnet")
    source = open_source(write_extxyz(folder / "a.xyz", structures(40)))
    systems = [source.read(i) for i in range(40)]
    source.close()
    return path, load_teacher(str(path), device=torch.device("cpu"), dtype=torch.float32), systems


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("settings", [{"encoding": ("int8",)}, {"max_error": 0.01}])
def test_atoms_without_neighbors_have_a_price(case, tmp_path, n, settings):
    alone = [ase.Atoms("H", positions=[[0.0, 0.0, k]]) for k in range(n)]
    store = make_store(tmp_path / "s.kdcache", write_extxyz(tmp_path / "a.xyz", alone))
    config = CacheConfig(store=store, teacher=str(case[0]), signals=("node", "edge"), **settings)
    price = plan_teacher(config, store)
    assert price.edges_per_atom == 0
    assert price.bytes_per_atom["edge"] == 4  # how many they are, once a system


def test_few_rows_are_kept(case, monkeypatch):
    """At most twice as many as wanted, of systems of the whole sample, and only of what is asked for."""
    _, teacher, systems = case
    every = probe_teacher(teacher, systems, ("node", "edge"), ("edge",), 100, 10**6).features
    monkeypatch.setattr(probing, "_MOST_ROWS", 100)
    few = probe_teacher(teacher, systems, ("node", "edge"), ("edge",), 100, 10**6).features
    assert set(every) == set(few) == {"edge"}
    assert 50 < len(few["edge"]) < 200 < len(every["edge"])
    rows = {row.tobytes(): k for k, row in enumerate(every["edge"])}
    places = np.array([rows[row.tobytes()] for row in few["edge"]])
    np.testing.assert_allclose(
        np.histogram(places, 4, (0, len(every["edge"])))[0] / len(places), 0.25, atol=0.1
    )


class SmallDevice:
    """A teacher on a device that holds batches of few edges."""

    def __init__(self, teacher, most_edges):
        self.neighbor_rule, self.dtype, self.device = teacher.neighbor_rule, teacher.dtype, teacher.device
        self.teacher, self.most_edges, self.sizes = teacher, most_edges, []

    def compute(self, batch, signals):
        self.sizes.append(batch.edge_index.shape[1])
        if self.sizes[-1] > self.most_edges:
            raise torch.OutOfMemoryError("out of memory")
        return self.teacher.compute(batch, signals)


def test_batches_fit_the_device(case):
    _, teacher, systems = case
    device = SmallDevice(teacher, 500)
    probe = probe_teacher(device, systems, ("energy",), (), 10**6, 10**6)
    assert sum(size > 500 for size in device.sizes) < 8  # halved, and remembered
    assert probe.teacher_rate > 0
    asked = SmallDevice(teacher, 10**6)
    probe_teacher(asked, systems, ("energy",), (), 10**6, 400)  # --batch-edges
    alone = [SmallDevice(teacher, 10**6) for _ in systems]
    for one, system in zip(alone, systems, strict=True):
        probe_teacher(one, [system], ("energy",), (), 10**6, 10**6)
    assert max(asked.sizes) <= max(400, *(one.sizes[0] for one in alone))
    with pytest.raises(TeacherError, match=r"a\.xyz.*edges need more memory than cpu has"):
        probe_teacher(SmallDevice(teacher, 1), systems, ("energy",), (), 10**6, 10**6)


def test_a_disk_that_cannot_be_written(tmp_path):
    assert write_bandwidth(tmp_path) > 0
    assert not list(tmp_path.iterdir())
    assert write_bandwidth(tmp_path / "none") is None
