"""TensorBoard shows the rows of metrics.csv, each once, whatever happened to the run."""

import math
import sys

import pytest
from distill_cases import before_step, read_metrics, train_config

from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import ModelError

FLOAT32 = 1e-6  # events hold single precision


class CrashError(Exception):
    """Stands for whatever ends a process."""


def events_of(run):
    """Return what TensorBoard reads: (tag, step) -> value; a step shown twice fails."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert (tag, event.step) not in found
            found[tag, event.step] = event.value
    return found


def rows_of(run):
    """Return the same from metrics.csv: train_energy is shown as train/energy."""
    return {
        (key.replace("_", "/", 1), int(row["step"])): float(value)
        for row in read_metrics(run)
        for key, value in row.items()
        if key != "step" and value != ""
    }


def assert_same(events, rows):
    assert events.keys() == rows.keys()
    assert len(rows) > 20
    for key, value in rows.items():
        assert math.isclose(events[key], value, rel_tol=FLOAT32, abs_tol=1e-12), key


def config_of(store, out):
    return train_config(store, out, tensorboard=True, kd=[{"name": "n2n"}], val_every=4, checkpoint_every=5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard itself
def test_events_hold_the_rows_of_metrics_csv(store, tmp_path):
    train_student(config_of(store, tmp_path / "run"))
    events = events_of(tmp_path / "run")
    assert_same(events, rows_of(tmp_path / "run"))
    assert {tag for tag, _ in events} >= {"train/n2n", "train/loss", "lr", "val/force_mae_meV_A"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_shows_each_step_once(store, tmp_path, monkeypatch):
    """It goes on from step 5; what had been shown of steps 6 to 8 gives way to what is computed again."""

    def crash():
        raise CrashError

    config = config_of(store, tmp_path / "run")
    with monkeypatch.context() as patch:
        before_step(patch, 8, crash)
        with pytest.raises(CrashError):
            train_student(config)
    assert max(step for _, step in events_of(tmp_path / "run")) == 8
    train_student(config)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    assert_same(events_of(tmp_path / "run"), rows_of(tmp_path / "run"))


def test_without_the_extra(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModelError, match=r"pip install 'molkd\[tensorboard\]'"):
        train_student(config_of(store, tmp_path / "run"))
