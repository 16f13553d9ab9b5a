"""Reading run folders, also torn ones, and sorting runs into comparable groups."""

from dataclasses import replace

import numpy as np
import pytest

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.groups import baseline_of, group_runs
from molkd.pipeline.evaluation.runs import kd_setting, read_curves, read_run

N2N = {"name": "n2n", "weight": "auto", "head": "linear", "loss": "mse"}


def test_run_folder_is_read(make_run):
    run = read_run(make_run("a", seed=3, kd=[N2N], label="x", force=31.0))
    assert (run.student, run.kd, run.seed, run.n_parameters, run.seconds) == (
        "painn-small",
        "n2n=auto",
        3,
        1000,
        12.5,
    )
    assert run.test["test"]["force_mae_meV_A"] == 31.0
    assert run.test["test"]["efwt_percent"] is None
    given = {
        "store": "acac.kdcache",
        "training.lr": 1e-3,
        "training.max_epochs": 5,
        "student": "painn-small",
    }
    assert run.settings.items() >= given.items()
    assert not {"seed", "out", "label", "kd", "mix"} & run.settings.keys()
    np.testing.assert_array_equal(run.curves["val_force_mae_meV_A"], [np.nan, 124.0, 62.0, 31.0])


def test_a_run_of_an_earlier_version_has_the_defaults_of_settings_it_did_not_know(make_run):
    older = read_run(make_run("older"))
    newer = read_run(make_run("newer", seed=1, amp="off", rotated_targets=False))
    assert older.settings == newer.settings
    assert len(group_runs([older, newer])) == 1


def test_mixed_stores_are_named_with_the_losses_and_are_a_setting_without_a_teacher(make_run):
    mix = [{"store": "/data/rattled.kdcache", "share": 0.5}]
    with_kd, without = (read_run(make_run(f"m{len(kd)}", kd=kd, mix=mix)) for kd in ([N2N], []))
    assert (with_kd.kd, with_kd.settings.get("mix")) == ("n2n=auto + 0.5 of rattled", None)
    assert (without.kd, without.settings["mix"]) == ("none", "0.5 of rattled")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("step,lr\n1,0.1\n2,0.2\n3,0.", [1, 2]),
        ("step,lr\n1,0.1\n2,0.2\n3", [1, 2]),
        ("step,lr\n1,0.1\n2,\n", [1, 2]),
        ("step,lr\n", []),
        ("step,l", None),
        ("", None),
    ],
)
def test_interrupted_curves_lose_only_the_torn_line(tmp_path, text, steps):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    curves = read_curves(path)
    assert curves == {} if steps is None else curves["step"].tolist() == steps


def test_missing_curves_are_empty(tmp_path):
    assert read_curves(tmp_path / "metrics.csv") == {}


def test_of_a_step_written_again_after_a_resume_the_last_row_counts(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,lr\n1,0.1\n2,0.2\n3,0.3\n2,0.25\n3,0.35\n")
    curves = read_curves(path)
    assert curves["step"].tolist() == [1, 2, 3]
    assert curves["lr"].tolist() == [0.1, 0.25, 0.35]


@pytest.mark.parametrize("line", ["2,abc", "2", "2,0.1,7"])
def test_damage_in_the_middle_names_file_and_line(tmp_path, line):
    path = tmp_path / "metrics.csv"
    path.write_text(f"step,lr\n1,0.1\n{line}\n3,0.3\n")
    with pytest.raises(DataError, match=r"metrics.csv: line 3 is damaged"):
        read_curves(path)


def test_foreign_csv_is_refused(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(DataError, match="no column `step`"):
        read_curves(path)


def test_unfinished_or_foreign_folders_say_what_to_do(make_run, tmp_path):
    with pytest.raises(DataError, match=r"no config.yaml"):
        read_run(tmp_path)
    folder = make_run("a")
    (folder / "metrics.json").write_text('{"val": ')
    with pytest.raises(DataError, match=r"metrics.json: damaged"):
        read_run(folder)
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(DataError, match=r"expected an object, found list"):
        read_run(folder)
    (folder / "metrics.json").unlink()
    with pytest.raises(DataError, match=r"has not finished; give its command again"):
        read_run(folder)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"config.yaml: cannot be read as YAML"):
        read_run(folder)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "none"),
        ({"kd": None}, "none"),
        ({"kd": [], "teacher": "painn"}, "none"),
        ({"kd": [{"name": "v2v", "weight": 1.0}, N2N]}, "n2n=auto + v2v=1"),
        (
            {"kd": [{"name": "n2n", "weight": 10000.0, "head": "mlp", "loss": "mae"}]},
            "n2n=10000,head=mlp,loss=mae",
        ),
        ({"kd": [{"name": "vanilla1", "weight": 1.0, "head": "mlp", "loss": "mae"}]}, "vanilla1=1"),
        ({"kd": [N2N, N2N | {"loss": "huber", "delta": 0.5}]}, "n2n=auto + n2n=auto,loss=huber,delta=0.5"),
        ({"kd": [], "pseudo_labels": True}, "pseudo-labels"),
        ({"kd": [N2N], "teacher": "painn"}, "n2n=auto from painn"),
    ],
)
def test_kd_settings_have_names(config, name):
    assert kd_setting(config) == name


def test_seeds_make_groups_and_the_baseline_comes_first(make_run):
    runs = [read_run(make_run(f"kd{s}", seed=s, kd=[N2N])) for s in (2, 0, 1)]
    runs += [read_run(make_run(f"no{s}", seed=s, device="cpu")) for s in (0, 1)]
    groups = group_runs(runs)
    assert [g.name for g in groups] == ["painn-small, without KD", "painn-small, n2n=auto"]
    assert [run.seed for run in groups[1].runs] == [0, 1, 2]
    assert baseline_of(groups[1], groups) is groups[0]
    assert groups[1].differences == ()


def test_runs_with_other_data_are_never_averaged_and_meet_their_own_baseline(make_run):
    runs = [
        read_run(make_run(f"{store}{bool(kd)}", store=store, kd=kd))
        for store in ("100.kdcache", "900.kdcache")
        for kd in ([], [N2N])
    ]
    groups = group_runs(runs)
    assert [g.name for g in groups] == [
        "painn-small, without KD, store=100.kdcache",
        "painn-small, without KD, store=900.kdcache",
        "painn-small, n2n=auto, store=100.kdcache",
        "painn-small, n2n=auto, store=900.kdcache",
    ]
    assert baseline_of(groups[2], groups) is groups[0]
    assert baseline_of(groups[3], groups) is groups[1]


def test_unequal_budgets_are_named(make_run):
    runs = [read_run(make_run("no")), read_run(make_run("kd", kd=[N2N], lr=5e-4))]
    assert group_runs(runs)[1].differences == ("training.lr: 0.0005, without KD 0.001",)
    runs = [read_run(make_run(f"steps{bool(kd)}", kd=kd)) for kd in ([], [N2N])]
    longer = replace(runs[1], summary=runs[1].summary | {"steps": 2400})
    groups = group_runs([replace(runs[0], summary=runs[0].summary | {"steps": 800}), longer])
    assert groups[1].differences == ("optimiser steps: 2,400, without KD 800",)


def test_another_student_is_no_baseline(make_run):
    groups = group_runs([read_run(make_run("a", student="schnet")), read_run(make_run("b", kd=[N2N]))])
    assert baseline_of(groups[0], groups) is None


def test_the_same_seed_twice_is_refused(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b"))]
    with pytest.raises(DataError, match=r"the same run \(seed 0\)"):
        group_runs(runs)
