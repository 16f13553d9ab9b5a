"""Run folders and evaluations with chosen numbers; makes helper modules of this folder importable."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from molkd.pipeline.evaluation import figures
from molkd.pipeline.evaluation.document import Picture
from molkd.pipeline.evaluation.metrics import MetricSums
from molkd.pipeline.evaluation.result import Evaluation, Parity

sys.path.insert(0, str(Path(__file__).parent))

HEADER = (
    "step,epoch,lr,seconds,train_loss,val_energy_mae_meV,val_force_mae_meV_A,val_force_cos,val_efwt_percent"
)


@pytest.fixture
def real_pictures():
    """Asked for by tests that look at a report's pictures; the others do without, which saves seconds."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    if "real_pictures" not in request.fixturenames:

        def save(figure, folder, path, alt):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(b"")
            return Picture(path, alt, "<svg/>", 1, 1)

        monkeypatch.setattr(figures, "save_picture", save)


@pytest.fixture
def make_run(tmp_path):
    """Return `write_run` for this test's folder."""
    return functools.partial(write_run, tmp_path)


@pytest.fixture(scope="session")
def run_writer():
    """Return `write_run`."""
    return write_run


def write_run(
    root,
    name,
    *,
    seed=0,
    kd=(),
    student="painn-small",
    energy=50.0,
    force=40.0,
    tests=("test",),
    lr=1e-3,
    label="",
    **config,
):
    """Write a run folder; errors in meV, meV/A stand in metrics.json and, times 4, 2, 1, in metrics.csv."""
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    settings = {
        "store": "acac.kdcache", "out": str(folder), "student": student, "seed": seed,
        "training": {"lr": lr, "max_epochs": 5}, "kd": list(kd), **config,
    }  # fmt: skip
    values = {"energy_mae_meV": energy, "force_mae_meV_A": force, "force_cos": 0.9, "efwt_percent": None}
    final = {
        "best_step": 300, "seconds": 12.5, "n_parameters": 1000, "student": student, "seed": seed,
        "label": label, "kd": {}, "val": values, "test": dict.fromkeys(tests, values),
    }  # fmt: skip
    lines = [
        f"{100 * i},{i},0.001,{2.0 * i},1.0,{energy * f},{force * f if force else ''},0.9,"
        for i, f in ((1, 4), (2, 2), (3, 1))
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.json").write_text(json.dumps(final))
    (folder / "metrics.csv").write_text("\n".join([HEADER, "50,0.5,0.001,1.0,2.0,,,,", *lines]) + "\n")
    return folder


@pytest.fixture(scope="session")
def make_evaluation():
    """Evaluate made-up predictions: energies off by `energy` eV, force components by `force` eV/A."""

    def make(energy=0.05, force=0.04, n_systems=60, n_atoms=20):
        rng = np.random.default_rng(0)
        energy_label = -100.0 + rng.normal(size=n_systems)
        forces_label = rng.normal(size=(n_systems * n_atoms, 3))
        parity = Parity(
            energy_label + energy,
            energy_label,
            np.full(n_systems, n_atoms),
            forces_label + force,
            forces_label,
        )
        sums = MetricSums()
        sums.update(
            energy_pred=parity.energy_pred,
            energy_label=energy_label,
            forces_pred=parity.forces_pred,
            forces_label=forces_label,
            system_idx=np.repeat(np.arange(n_systems), n_atoms),
            fixed=np.zeros(len(forces_label), bool),
        )
        return Evaluation(sums.result(), 100.0, parity)

    return make
