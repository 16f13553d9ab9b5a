"""A store with two teachers' signals, and study files over it."""

import sys
from pathlib import Path

import pytest
import yaml

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), *(str(_TESTS / name) for name in ("stage_one", "teachers"))]

SIGNALS = ("energy", "forces", "atomic_energies", "node", "v2v")


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with a store of 60 systems, teachers big (PaiNN) and flat (SchNet), and test.extxyz."""
    from stage_one_cases import make_store, structures, write_extxyz, write_teacher

    from molkd.pipeline.caching import cache_teacher
    from molkd.pipeline.config import CacheConfig

    folder = tmp_path_factory.mktemp("material")
    write_extxyz(folder / "test.extxyz", structures(12, seed=5))
    store = make_store(folder / "s.kdcache", write_extxyz(folder / "train.extxyz", structures(60)))
    write_teacher(folder / "big")
    write_teacher(folder / "flat", "schnet")
    for name, signals in (("big", SIGNALS), ("flat", SIGNALS[:4])):
        model = str(folder / f"{name}.safetensors")
        cache_teacher(CacheConfig(store=store, teacher=model, signals=signals, name=name))
    return folder


@pytest.fixture
def content(material):
    """What a study file says: two students, three strategies, two seeds of two steps."""
    return {
        "name": "small",
        "store": str(material / "s.kdcache"),
        "teachers": {"big": {"model": str(material / "big.safetensors")}},
        "pairs": [{"teacher": "big", "student": "painn-tiny", "name": "p"}],
        "strategies": {"none": [], "n2n": "n2n", "n2n+v2v": ["n2n", "v2v=2"]},
        "seeds": 2,
        "steps": 2,
        "set": {"model.hidden_channels": 8, "model.num_layers": 1, "training.batch_size": 4},
        "test": str(material / "test.extxyz"),
    }


@pytest.fixture
def write(tmp_path):
    """Write a study file and return its path."""

    def write(content, name="study.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def study(content, write):
    """Read a study from the content with some keys replaced."""
    from molkd.pipeline.study.reading import read_study

    return lambda **changes: read_study(write({**content, **changes}))


@pytest.fixture
def runs_here(monkeypatch):
    """Train in this process instead of one for each run; return the folders of the runs that were started."""
    import study_cases

    return study_cases.train_here(monkeypatch)


@pytest.fixture
def no_tables(monkeypatch):
    """Make no tables, whose pictures take long; return a list with what each would have been made of."""
    from molkd.pipeline.study import run

    asked = []
    monkeypatch.setattr(run, "write_tables", lambda study, cells, standings: asked.append(standings))
    return asked
