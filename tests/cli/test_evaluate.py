"""`kd evaluate` on several data sets, by parts, with the worst systems and in turns."""

import json
import shutil

import ase.io
import numpy as np
import pytest
from cli_arguments import train
from stage_one_cases import structures, write_extxyz

FLOAT32 = 1e-5  # relative; labels and predictions have been text in between


def result_of(kd, *arguments):
    result = kd(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def predicted(path):
    """Return frames of a file of predictions with |dE| (S,) and dF (N, 3) each, in meV and meV/A."""
    frames = ase.io.read(path, ":", format="extxyz")
    energy = [1e3 * abs(f.info["predicted_energy"] - f.get_potential_energy()) for f in frames]
    forces = [1e3 * (f.arrays["predicted_forces"] - f.get_forces(apply_constraint=False)) for f in frames]
    return frames, np.array(energy), forces


@pytest.fixture
def sets(everything, tmp_path):
    """Two more files beside test.extxyz."""
    return [everything / "test.extxyz", write_extxyz(tmp_path / "hot.extxyz", structures(20, seed=9))]


def test_several_data_sets_and_their_mean(kd, everything, sets):
    run = everything / "run"
    alone = [result_of(kd, "evaluate", run, path) for path in sets]
    result = result_of(kd, "evaluate", run, *sets)
    assert list(result["sets"]) == ["test", "hot"]
    for single, joint in zip(alone, result["sets"].values(), strict=True):
        assert joint["n_systems"] == single["n_systems"]
        assert joint["force_mae_meV_A"] == pytest.approx(single["force_mae_meV_A"], rel=FLOAT32)
    mean = result["means"]["mean"]
    assert mean["sets"] == ["test", "hot"]
    for key in ("energy_mae_meV", "force_mae_meV_A", "force_cos", "efwt_percent"):
        assert mean[key] == pytest.approx(np.mean([single[key] for single in alone]), rel=FLOAT32)
    assert "mean of 2" in kd("evaluate", run, *sets).out
    named = result_of(kd, "evaluate", run, *sets, "--group", "all=test,hot", "--group", "cold=test")
    assert list(named["means"]) == ["all", "cold"]
    assert named["means"]["all"]["energy_mae_meV"] == pytest.approx(mean["energy_mae_meV"], rel=FLOAT32)


def test_oc20s_splits_are_recognised(kd, everything, tmp_path, caplog):
    names = [f"val_{part}" for part in ("id", "ood_ads", "ood_cat", "ood_both")]
    paths = [write_extxyz(tmp_path / f"{n}.extxyz", structures(4, seed=i)) for i, n in enumerate(names)]
    shown = kd("evaluate", everything / "run", *paths)
    assert "oc20-val, mean of 4" in shown.out
    assert "OC20's four splits, their mean is oc20-val" in caplog.text


def test_errors_by_element_tag_and_size(kd, everything, tmp_path):
    out, run, data = tmp_path / "p.extxyz", everything / "run", everything / "test.extxyz"
    kinds = ("--by", "element", "--by", "tag", "--by", "size", "--by", "source")
    result = result_of(kd, "evaluate", run, data, *kinds, "--predictions", out)["by"]
    frames, energy, forces = predicted(out)
    free = np.concatenate([~f.arrays["fixed"].astype(bool) for f in frames])
    numbers = np.concatenate([f.numbers for f in frames])
    tags = np.concatenate([f.get_tags() for f in frames])
    errors = np.abs(np.concatenate(forces))
    for symbol, z in (("H", 1), ("C", 6), ("O", 8)):
        found = result["element"][symbol]
        assert found["n_force_atoms"] == (free & (numbers == z)).sum()
        assert found["force_mae_meV_A"] == pytest.approx(errors[free & (numbers == z)].mean(), rel=FLOAT32)
        assert "energy_mae_meV" not in found
    adsorbate = errors[free & (tags == 2)].mean()
    assert result["tag"]["adsorbate (2)"]["force_mae_meV_A"] == pytest.approx(adsorbate, rel=FLOAT32)
    sizes = np.array([len(f) for f in frames])
    assert list(result["size"]) == [str(n) for n in sorted(set(sizes))]
    for n in set(sizes):
        mae = result["size"][str(n)]["energy_mae_meV"]
        assert mae == pytest.approx(energy[sizes == n].mean(), rel=FLOAT32)
    assert list(result["source"]) == ["test.extxyz"]
    shown = kd("evaluate", run, data, *kinds).out
    assert f"{result['element']['C']['force_mae_meV_A']:.0f}" in shown
    assert "by tag" in shown


def test_a_store_knows_the_files_of_its_systems(kd, everything):
    result = result_of(kd, "evaluate", everything / "run", everything / "train.kdcache", "--by", "source")
    assert list(result["by"]["source"]) == [str(everything / "train.extxyz")]


def test_words_beside_structures(kd, everything, tmp_path):
    frames = structures(9, seed=2)
    for i, frame in enumerate(frames):
        if i != 8:
            frame.info["phase"] = "solid" if i % 2 else "gas"
    frames[0].info["phase"] = "\x1b[2Jgas\x07"  # what a terminal would obey
    data = write_extxyz(tmp_path / "phases.extxyz", frames)
    result = result_of(kd, "evaluate", everything / "run", data, "--by", "info:phase")["by"]["info:phase"]
    counts = {key: found["n_systems"] for key, found in result.items()}
    assert counts == {"gas": 3, "solid": 4, "(none)": 1, "?[2Jgas?": 1}


def test_the_worst_systems_and_their_file(kd, everything, sets, tmp_path):
    out, all_of_them = tmp_path / "new" / "worst.extxyz", tmp_path / "p.extxyz"
    arguments = ("evaluate", everything / "run", sets[1], "--worst", "3", "--worst-out", out)
    result = result_of(kd, *arguments, "--predictions", all_of_them)
    frames, energy, forces = predicted(all_of_them)
    free = [~f.arrays["fixed"].astype(bool) for f in frames]
    lengths = np.array(
        [np.linalg.norm(f, axis=1)[m].max(initial=0) for f, m in zip(forces, free, strict=True)]
    )
    worst = {"energy": np.argsort(-energy)[:3], "forces": np.argsort(-lengths)[:3]}
    for by, key, errors in (
        ("energy", "energy_error_meV", energy), ("forces", "force_error_meV_A", lengths),
    ):  # fmt: skip
        listed = result["worst"][by]
        assert [entry["source"] for entry in listed] == [f"hot.extxyz#{i}" for i in worst[by]]
        np.testing.assert_allclose([abs(e[key]) for e in listed], errors[worst[by]], rtol=FLOAT32)
    written = ase.io.read(out, ":", format="extxyz")
    ranked = sorted((f for f in written if "energy_rank" in f.info), key=lambda f: f.info["energy_rank"])
    assert [f.info["source"] for f in ranked] == [f"hot.extxyz#{i}" for i in worst["energy"]]
    assert len(written) == len({*worst["energy"], *worst["forces"]})
    again = result_of(kd, "evaluate", everything / "run", out)  # the file is data like any other
    assert again["tail"]["energy"]["max_meV"] == pytest.approx(energy.max(), rel=FLOAT32)
    assert "hot.extxyz#" in kd(*arguments).out


@pytest.fixture
def short(monkeypatch):
    """Speeds are measured for a moment only."""
    monkeypatch.setattr("molkd.pipeline.measuring.SECONDS", 0.1)
    monkeypatch.setattr("molkd.pipeline.evaluation.turns._TURN_SECONDS", 1e-9)


@pytest.mark.usefixtures("short")
def test_speeds_in_turns(kd, everything):
    teacher, run = everything / "teacher.safetensors", everything / "run"
    arguments = ("evaluate", run, everything / "test.extxyz", "--throughput", "--beside", teacher)
    speeds = result_of(kd, *arguments, "--batch-size", "4")["speeds"]
    assert list(speeds) == [str(run), str(teacher)]
    for speed in speeds.values():
        for found in speed.values():
            assert 0 < found["lower_quartile"] <= found["median"] <= found["upper_quartile"]
            assert found["conditions"]["batch_size"] == 4
            assert found["conditions"]["dtype"] == "float32"
        assert speed["model"]["conditions"] == speed["end_to_end"]["conditions"]


@pytest.mark.usefixtures("short")
def test_groups_of_a_run_reach_its_report(kd, everything, sets, tmp_path):
    teacher = everything / "teacher.safetensors"
    runs = [tmp_path / "plain", tmp_path / "kd"]
    tests = ("--test", sets[0], "--test", sets[1], "--group", "both=test,hot")
    for run, term in zip(runs, ("none", "n2n=auto"), strict=True):
        trained = result_of(kd, *train(everything / "train.kdcache", run, "--kd", term, *tests))
        of_sets = [trained["test"][name]["energy_mae_meV"] for name in ("test", "hot")]
        assert trained["test_means"]["both"]["energy_mae_meV"] == pytest.approx(np.mean(of_sets))
    arguments = ("report", *runs, "--out", tmp_path / "r", "--teacher", teacher, "--group", "other=hot")
    report = result_of(kd, *arguments, "--throughput")
    assert list(report["tables"]) == ["both", "test", "hot", "other"]
    both, test, hot, _ = report["tables"].values()
    for mean, *parts in zip(both, test, hot, strict=True):
        values = [part["metrics"]["energy_mae_meV"]["mean"] for part in parts]
        assert mean["metrics"]["energy_mae_meV"]["mean"] == pytest.approx(np.mean(values))
        assert mean["end_to_end_per_second"]["mean"] > 0


def test_what_is_refused(refused, everything, sets, tmp_path):
    run = everything / "run"
    other = tmp_path / "other" / "test.extxyz"
    other.parent.mkdir()
    shutil.copy(sets[0], other)
    refused("evaluate", run, sets[0], "--beside", run, says=["--beside .* goes with --throughput"])
    twice = ("--predictions", tmp_path / "p.xyz", "--worst-out", tmp_path / "p.xyz")
    refused("evaluate", run, sets[0], *twice, says=["p.xyz: named for --predictions and for --worst-out"])
    before = sets[0].read_bytes()
    for option in ("--predictions", "--worst-out"):
        refused("evaluate", run, sets[0], option, sets[0], says=[f"is read here.* {option}"])
        refused("evaluate", run, sets[0], option, other.parent, says=["is a folder"])
    assert sets[0].read_bytes() == before
    assert other.parent.is_dir()
    refused("evaluate", run, sets[0], "--by", "colour", says=["--by colour: take element, tag, size"])
    refused("evaluate", run, sets[0], other, says=["DATA: two files of the same name"])
    refused(
        "evaluate", run, *sets, "--group", "a=cold", says=["no test set is called cold; there are test, hot"]
    )
    refused("evaluate", run, *sets, "--group", "a", says=["write it as NAME=SET,SET"])
    refused(
        *train(everything / "train.kdcache", tmp_path / "new", "--test", sets[0], "--group", "a=cold"),
        says=["group a: no test set is called cold; there is test"],
    )
    refused("report", run, "--out", tmp_path / "r", "--group", "a=cold", says=["there is test"])
