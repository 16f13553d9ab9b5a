"""`kd report` measures again whatever may have changed, and computes nothing before all is in order."""

import shutil
from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from molkd.pipeline import evaluating
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.errors import ConfigError, DataError
from molkd.pipeline.evaluating import report_runs
from molkd.pipeline.evaluation.result import FOLDER, Evaluation
from molkd.pipeline.measuring import evaluate_model
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model


def write_model(folder, seed=0):
    config = {"name": "painn", "hidden_channels": 8, "num_layers": 1, "num_rbf": 4, "cutoff": 3.0}
    torch.manual_seed(seed)
    model = build_model(config)
    Potential(model, LabelScale(), {"model": config}).save(folder / "best.safetensors")


def write_data(path, shift=0.0, n=3, key=None):
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(n):
        atoms = molecule("H2O")
        atoms.rattle(0.05, rng=rng)
        energy, forces = -10.0 + shift, np.zeros((3, 3))
        if key is None:
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        else:
            atoms.info[key] = energy
        frames.append(atoms)
    path.parent.mkdir(exist_ok=True)
    ase.io.write(path, frames, format="extxyz")
    return path


@pytest.fixture
def run(make_run, tmp_path):
    """A finished run that names a/hot.extxyz as its test data."""
    data = write_data(tmp_path / "a" / "hot.extxyz")
    folder = make_run("run", tests=(), test={"hot": str(data)})
    write_model(folder)
    return folder


def kept(run):
    return run / FOLDER / "hot.npz"


def measured(run, data, **keys):
    """What `kd evaluate` says of a run on one data set."""
    (summary,) = evaluate_model(str(run), [data], **keys).sets.values()
    return summary


def energy_error(report):
    return report.tables["hot"][0].metrics["energy_mae_meV"].mean


def test_a_measurement_is_reused_only_with_its_weights_and_data(run, tmp_path):
    out, data = tmp_path / "out", tmp_path / "a" / "hot.extxyz"
    first = energy_error(report_runs([run], out))
    assert first == pytest.approx(measured(run, data).energy_mae_meV)
    written = kept(run).stat().st_mtime_ns
    assert energy_error(report_runs([run], out)) == first
    assert kept(run).stat().st_mtime_ns == written

    write_data(data, shift=1000.0)  # other labels, same structures
    second = energy_error(report_runs([run], out))
    assert second == pytest.approx(measured(run, data).energy_mae_meV)
    assert abs(second - first) > 1e5

    write_model(run, seed=1)
    third = energy_error(report_runs([run], out))
    assert third == pytest.approx(measured(run, data).energy_mae_meV)
    assert third != pytest.approx(second, rel=1e-6)


def test_a_measurement_of_unknown_origin_is_made_again(run, make_evaluation, tmp_path):
    make_evaluation().save(kept(run))
    report = report_runs([run], tmp_path / "out")
    assert report.tables["hot"][0].metrics["energy_mae_meV"].mean != pytest.approx(50.0)
    kept(run).write_bytes(b"damaged")
    report_runs([run], tmp_path / "out")
    assert Evaluation.load(kept(run)).metrics.n_systems == 3


def test_a_measurement_of_an_older_version_is_completed(run, tmp_path):
    data = tmp_path / "a" / "hot.extxyz"
    report_runs([run], tmp_path / "out")
    whole = Evaluation.load(kept(run))
    replace(whole, worst={}, energy_tail=None, breakdowns={}).save(kept(run))
    moved = data.rename(tmp_path / "elsewhere.extxyz")
    report_runs([run], tmp_path / "out")
    assert not Evaluation.load(kept(run)).is_complete  # the data are gone: what there is still counts
    moved.rename(data)
    report_runs([run], tmp_path / "out")
    assert Evaluation.load(kept(run)).energy_tail == whole.energy_tail


def test_measurements_of_a_teacher_are_kept_where_asked(run, make_run, tmp_path):
    """Several reports with one teacher measure it once, and again when it is another one."""
    teacher, folder = make_run("teacher", tests=()), tmp_path / "kept"
    write_model(teacher, seed=1)
    asked = {"teacher": str(teacher / "best.safetensors"), "keep_teacher": folder}
    first = energy_error(report_runs([run], tmp_path / "out", **asked))
    written = (folder / "hot.npz").stat().st_mtime_ns
    assert energy_error(report_runs([run], tmp_path / "out", **asked)) == first
    assert (folder / "hot.npz").stat().st_mtime_ns == written
    write_model(teacher, seed=2)
    assert energy_error(report_runs([run], tmp_path / "out", **asked)) != pytest.approx(first, rel=1e-6)
    report_runs([run], tmp_path / "out", teacher=asked["teacher"])  # kept nowhere
    assert not kept(teacher).exists()


def test_test_data_of_several_reports_are_read_once_for_their_fingerprint(run, tmp_path, monkeypatch):
    read, known = [], {}
    whole = evaluating.fingerprint
    monkeypatch.setattr(evaluating, "fingerprint", lambda source: read.append(source.path) or whole(source))
    errors = [energy_error(report_runs([run], tmp_path / "out", fingerprints=known)) for _ in range(2)]
    assert errors[0] == errors[1]
    assert len(read) == 1
    report_runs([run], tmp_path / "out")
    assert len(read) == 2


def test_one_name_for_two_data_sets_is_refused(run, make_run, tmp_path):
    other = write_data(tmp_path / "b" / "hot.extxyz", shift=1.0)
    second = make_run("second", seed=1, tests=(), test={"hot": str(other)})
    write_model(second)
    with pytest.raises(ConfigError, match=r"a/hot\.extxyz and .*b/hot\.extxyz are both called hot"):
        report_runs([run, second], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"a/hot\.extxyz and .*b/hot\.extxyz are both called hot"):
        report_runs([run], tmp_path / "out", test=[other])
    assert not kept(run).exists()
    assert not (tmp_path / "out").exists()
    copy = write_data(tmp_path / "c" / "hot.extxyz")
    assert report_runs([run], tmp_path / "out", test=[copy]).tables.keys() == {"hot"}


def test_nothing_is_computed_when_a_run_has_not_finished(run, make_run, tmp_path):
    unfinished = make_run("unfinished", seed=1)
    (unfinished / "metrics.json").unlink()
    with pytest.raises(DataError, match="has not finished"):
        report_runs([run, unfinished], tmp_path / "out")
    assert not kept(run).exists()
    assert not (tmp_path / "out").exists()


def test_test_data_that_are_gone(run, tmp_path):
    """What was measured with these weights still counts; without a measurement the remedy is named."""
    data = tmp_path / "a" / "hot.extxyz"
    first = energy_error(report_runs([run], tmp_path / "out"))
    moved = shutil.move(data, write_data(tmp_path / "b" / "hot.extxyz"))
    assert energy_error(report_runs([run], tmp_path / "out")) == first
    write_model(run, seed=1)
    with pytest.raises(DataError, match=r"a/hot\.extxyz: test data of a run, no longer there; .*--test"):
        report_runs([run], tmp_path / "out")
    assert energy_error(report_runs([run], tmp_path / "out", test=[moved])) > 0


def test_kept_measurements_on_different_data_that_are_gone(run, make_run, tmp_path):
    other = write_data(tmp_path / "b" / "hot.extxyz", shift=1.0)
    second = make_run("second", seed=1, tests=(), test={"hot": str(other)})
    write_model(second)
    for folder in (run, second):
        report_runs([folder], tmp_path / "out")
    (tmp_path / "a" / "hot.extxyz").unlink()
    other.unlink()
    with pytest.raises(ConfigError, match=r"run and .*second were measured on different data called hot"):
        report_runs([run, second], tmp_path / "out")


def test_keys_of_labels_in_test_files(run, tmp_path, caplog):
    named = write_data(tmp_path / "b" / "named.extxyz", key="my_energy")
    report = report_runs([run], tmp_path / "out", test=[named], energy_key="my_energy")
    found = report.tables["named"][0].metrics
    expected = measured(run, named, energy_key="my_energy")
    assert found["energy_mae_meV"].mean == pytest.approx(expected.energy_mae_meV)
    assert "named.extxyz: no forces to compare with; if it holds any, name their key: --forces-key" in (
        caplog.text
    )
    assert "no energies" not in caplog.text
    caplog.clear()
    assert measured(run, named).energy_mae_meV is None
    assert "named.extxyz: no energies to compare with" in caplog.text


def test_keys_of_labels_are_those_of_the_run(make_run, tmp_path):
    """A file may hold two energies: a report has to take the one that the run was told to take."""
    data = write_data(tmp_path / "a" / "hot.extxyz", key="my_energy")
    frames = ase.io.read(data, ":")
    for atoms in frames:
        atoms.info["energy"] = atoms.info["my_energy"] + 50.0
    ase.io.write(data, frames, format="extxyz")
    folder = make_run("run", tests=(), test={"hot": str(data)}, energy_key="my_energy")
    write_model(folder)
    expected = measured(folder, data, energy_key="my_energy").energy_mae_meV
    assert abs(expected - measured(folder, data).energy_mae_meV) > 10_000
    assert energy_error(report_runs([folder], tmp_path / "out")) == pytest.approx(expected)
    assert energy_error(report_runs([folder], tmp_path / "out", test=[data])) == pytest.approx(expected)
    other = make_run("other", tests=(), seed=1, test={"hot": str(data)})
    write_model(other)
    with pytest.raises(ConfigError, match=r"other: takes other labels of .*hot\.extxyz \(energy: the usual"):
        report_runs([folder, other], tmp_path / "out")


def test_the_teacher_is_no_student(run, make_run, tmp_path, caplog):
    """`kd report runs/* --teacher runs/teacher` finds it among the runs."""
    teacher = make_run("teacher", tests=(), seed=1, test={"hot": str(tmp_path / "a" / "hot.extxyz")})
    write_model(teacher, seed=1)
    with caplog.at_level("INFO", "molkd"):
        report = report_runs([run, teacher], tmp_path / "out", teacher=str(teacher))
    assert [row.role for row in report.tables["hot"]].count("teacher") == 1
    assert len(report.tables["hot"]) == 2
    assert "is the teacher, not counted among the students" in caplog.text
    with pytest.raises(ConfigError, match="is the only run"):
        report_runs([teacher], tmp_path / "out", teacher=str(teacher))
