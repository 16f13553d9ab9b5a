"""Results on stdout as text or JSON, log on stderr, and that the numbers are right."""

import json
import shutil
import sys
import types

import ase.io
import numpy as np
import pytest
import torch
from cli_arguments import train
from forked_commands import run
from stage_one_cases import files, one_batch, structures, write_extxyz

from molkd.cache_schema.reader import Cache
from molkd.pipeline.teachers.load import load_teacher


def parse(text):
    """Read strict JSON: NaN and Infinity are none."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def result_of(kd, *arguments):
    result = kd(*arguments, "--json")
    assert result.code == 0, result.err
    return parse(result.out)


def test_both_stages(kd, everything, tmp_path):
    """The commands of the README one after the other, each result against the files it speaks of."""
    data, store = everything / "train.extxyz", tmp_path / "a.kdcache"
    systems = structures(60)
    ingested = result_of(kd, "ingest", data, store)
    assert ingested["n_systems"] == ingested["n_with_energy"] == ingested["n_with_forces"] == 60
    assert ingested["n_atoms"] == sum(map(len, systems))

    teacher = everything / "teacher.safetensors"
    asked = ("cache-teacher", store, "--teacher", teacher, "--signals", "energy, node,v2v")
    before = files(tmp_path)
    price = result_of(kd, *asked, "--dry-run")
    assert files(tmp_path) == before
    assert set(price["bytes_per_atom"]) == {"energy", "node", "v2v"}
    cached = result_of(kd, *asked)
    assert cached["signals"] == {"energy": "fp64", "node": "fp16", "v2v": "fp16"}
    assert cached["n_computed"] == 60
    assert result_of(kd, *asked)["n_computed"] == 0

    info = result_of(kd, "cache", "info", store)
    assert info["systems"] == info["systems_with_energy"] == 60
    assert info["fingerprint"] == ingested["fingerprint"]
    assert set(info["teachers"]["teacher"]["signals"]) == {"energy", "node", "v2v"}
    checked = result_of(kd, "cache", "verify", store)
    assert checked["problems"] == checked["notes"] == []
    assert checked["n_bytes"] == info["bytes"] == sum(map(len, files(store).values()))

    test = write_extxyz(tmp_path / "test.extxyz", structures(12, seed=5))
    student = train(store, tmp_path / "run", "--kd", "n2n=auto", "--kd", "v2v=1.0", "--test", test)
    trained = result_of(kd, *student)
    assert trained["finished"]
    assert trained["steps"] == 2
    evaluated = result_of(kd, "evaluate", tmp_path / "run", test)
    assert evaluated["energy_mae_meV"] == pytest.approx(trained["test"]["test"]["energy_mae_meV"], rel=1e-5)
    assert result_of(kd, *student) == trained


@pytest.mark.parametrize("model", ["run", "run/best.safetensors", "teacher.safetensors", "ethanol.npz"])
def test_evaluation_and_predictions(kd, everything, tmp_path, model):
    """Against the mean errors of predictions made one system at a time, and the file that ASE reads."""
    data, out = everything / "train.extxyz", tmp_path / "new" / "predicted.extxyz"
    result = result_of(kd, "evaluate", everything / model, data, "--predictions", out, "--batch-size", "7")
    teacher = load_teacher(str(everything / model), device="cpu")
    errors, force_errors = [], []
    frames = ase.io.read(out, index=":", format="extxyz")
    assert len(frames) == 60
    for atoms, frame in zip(structures(60), frames, strict=True):
        alone = teacher.compute(one_batch(atoms, teacher.neighbor_rule, torch.float32), ("energy", "forces"))
        energy, forces = alone["energy"].item(), alone["forces"].numpy()
        assert frame.info["predicted_energy"] == pytest.approx(energy, rel=1e-6)
        np.testing.assert_allclose(frame.arrays["predicted_forces"], forces, rtol=1e-3, atol=1e-4)
        label = atoms.calc.results
        np.testing.assert_allclose(frame.get_potential_energy(), label["energy"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(frame.get_forces(apply_constraint=False), label["forces"], atol=1e-6)
        np.testing.assert_array_equal(frame.numbers, atoms.numbers)
        np.testing.assert_allclose(frame.positions, atoms.positions, rtol=0, atol=1e-6)
        errors.append(abs(energy - label["energy"]))
        free = np.setdiff1d(np.arange(len(atoms)), atoms.constraints[0].index if atoms.constraints else [])
        force_errors.append(np.abs(forces - label["forces"])[free])
    assert result["n_systems"] == result["n_energies"] == 60
    assert result["energy_mae_meV"] == pytest.approx(1e3 * np.mean(errors), rel=1e-5)
    assert result["force_mae_meV_A"] == pytest.approx(1e3 * np.concatenate(force_errors).mean(), rel=1e-4)


def test_evaluation_without_labels_still_predicts(kd, everything, tmp_path):
    out = tmp_path / "predicted.extxyz"
    result = result_of(kd, "evaluate", everything / "run", everything / "bare.extxyz", "--predictions", out)
    assert result["n_systems"] == 10
    assert result["energy_mae_meV"] is None
    assert len(ase.io.read(out, index=":")) == 10


def test_store_as_test_data(kd, everything):
    from_store = result_of(kd, "evaluate", everything / "run", everything / "train.kdcache")
    from_file = result_of(kd, "evaluate", everything / "run", everything / "train.extxyz")
    assert from_store["energy_mae_meV"] == pytest.approx(from_file["energy_mae_meV"], rel=1e-5)


def test_report(kd, everything, tmp_path):
    runs = [shutil.copytree(everything / "run", tmp_path / "run"), tmp_path / "other"]
    result_of(kd, *train(everything / "train.kdcache", runs[1], "--seed", "1", "--label", "other"))
    teacher = everything / "teacher.safetensors"
    data = everything / "train.extxyz"
    arguments = ("report", *runs, "--out", tmp_path / "report", "--teacher", teacher, "--test", data)
    result = result_of(kd, *arguments)
    assert result
    text = (tmp_path / "report" / "report.md").read_text()
    assert "painn-tiny" in text
    assert "teacher" in text
    pictures = list((tmp_path / "report").rglob("*.png"))
    assert pictures
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    mae = result_of(kd, "evaluate", runs[0], data)["energy_mae_meV"]
    assert f"{mae:.0f}" in text
    assert kd(*arguments).out.count("painn-tiny") >= 1


def test_doctor(kd, tmp_path, monkeypatch):
    healthy = result_of(kd, "doctor", tmp_path)
    assert healthy["cache_folder"]["write and rename"] == "yes"
    assert healthy["packages"]["torch"] == torch.__version__
    assert not [p for p in healthy["problems"] if str(tmp_path) in p]
    assert list(tmp_path.iterdir()) == []
    assert any("no such folder" in p for p in result_of(kd, "doctor", tmp_path / "none")["problems"])


def test_doctor_where_nothing_may_be_written(kd, tmp_path, monkeypatch):
    """The superuser may write anywhere, so the refusal is simulated."""
    from pathlib import Path

    original = Path.open

    def refuse(self, mode="r", *args, **kwargs):
        if self.is_relative_to(tmp_path) and "w" in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    result = result_of(kd, "doctor", tmp_path)
    assert result["cache_folder"]["write and rename"] == "no"
    assert f"{tmp_path}: cannot be written (Permission denied); ask its owner" in result["problems"][0]


def test_streams_of_a_real_process(everything, tmp_path):
    """Log and warnings on stderr, the result alone on stdout; --quiet leaves warnings only."""
    systems = everything / "train.extxyz"
    store = tmp_path / "s.kdcache"
    command = ["ingest", systems, systems, store, "--json"]
    loud = run(command, tmp_path / "log")
    assert loud.wait() == 0
    assert parse(loud.out)["n_duplicates"] == 60
    assert "60 duplicates dropped" in loud.text
    quiet = run(["--quiet", *command], tmp_path / "log")
    assert quiet.wait() == 0
    assert parse(quiet.out)["n_duplicates"] == 60
    assert quiet.text == ""


def test_a_quiet_run_still_keeps_its_log(kd, everything, tmp_path):
    """The run's log.txt says why things are as they are, whatever the terminal showed."""
    arguments = ["train-student", everything / "train.kdcache", "--student", "painn-tiny", "--kd", "none"]
    done = kd("--quiet", *arguments, "--steps", "1", "--batch-size", "2", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "scale factors fitted" in (tmp_path / "run" / "log.txt").read_text()


def test_text_output_shows_the_same_numbers(kd, everything):
    shown = kd("evaluate", everything / "run", everything / "train.extxyz").out
    exact = result_of(kd, "evaluate", everything / "run", everything / "train.extxyz")
    assert f"{exact['energy_mae_meV']:.6g}" in shown
    info = kd("cache", "info", everything / "train.kdcache").out
    assert "60 systems" in info
    assert Cache.open(everything / "train.kdcache").fingerprint in info


def test_debug_shows_where_an_error_came_from(kd, tmp_path):
    result = kd("--debug", "cache", "info", tmp_path / "none.kdcache")
    assert result.code == 1
    assert result.err.startswith("Traceback (most recent call last)")
    assert result.err.rstrip().splitlines()[-1].startswith("error: ")


@pytest.fixture
def fails_with(kd, monkeypatch):
    """Run a command whose library function raises an error; return exit code and stderr."""

    def run_with(error):
        module = types.ModuleType("molkd.pipeline.doctor")

        def diagnose(folder):
            raise error

        module.diagnose = diagnose
        monkeypatch.setitem(sys.modules, "molkd.pipeline.doctor", module)
        result = kd("doctor")
        assert result.out == ""
        return result.code, result.err

    return run_with


def test_errors_of_every_kind_are_one_line(fails_with):
    from molkd.pipeline.errors import DataError, IntegrityError

    assert fails_with(DataError("a.xyz#3: wrong")) == (1, "error: a.xyz#3: wrong\n")
    assert fails_with(IntegrityError("s: damaged")) == (3, "error: s: damaged\n")
    code, text = fails_with(OSError(28, "No space left on device", "/x/y"))
    assert (code, text.count("\n")) == (1, 1)
    assert "No space left on device: '/x/y'; check the path, its rights and the free space" in text
    code, text = fails_with(KeyError("bug"))
    assert (code, text.count("\n")) == (1, 1)
    assert text == "unexpected KeyError: 'bug'; run again with kd --debug and report it\n"
    assert fails_with(KeyboardInterrupt()) == (130, "\ninterrupted; the same command continues\n")
