"""Groups of test sets: means by hand, order of the averages, and what is refused or remarked upon."""

import json

import pytest

from molkd.pipeline.config import SplitGroup, TrainConfig, make_config, parse_groups
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation.report import write_report
from molkd.pipeline.evaluation.results import TeacherResult
from molkd.pipeline.evaluation.splits import mean_report, split_groups

N2N = {"name": "n2n", "weight": "auto", "head": "linear", "loss": "mse"}
OC20 = [f"test_{part}" for part in ("id", "ood_ads", "ood_cat", "ood_both")]


def _values(energy, force, cos=0.5, efwt=1.0, rate=10.0):
    return {
        "energy_mae_meV": energy, "force_mae_meV_A": force, "force_cos": cos, "efwt_percent": efwt,
        "systems_per_second": rate,
    }  # fmt: skip


def test_every_split_weighs_the_same():
    group = SplitGroup("both", ("a", "b"))
    means, problems = mean_report(group, {"a": _values(10, 1, 0.2, 0, 10), "b": _values(30, 4, 0.4, 2, 30)})
    # a system of each takes 1/10 + 1/30 = 2/15 s: 15 systems a second
    assert means == pytest.approx(_values(20, 2.5, 0.3, 1, 15))
    assert problems == []


def test_a_missing_split_or_metric_leaves_no_mean():
    group = SplitGroup("both", ("a", "b"))
    means, problems = mean_report(group, {"a": _values(10, 1)})
    assert set(means.values()) == {None}
    assert problems == ["no mean over both: b was not measured"]
    means, problems = mean_report(group, {"a": _values(10, 1), "b": _values(None, 3)})
    assert (means["energy_mae_meV"], means["force_mae_meV_A"]) == (None, 2)
    assert problems == ["no mean of energy_mae_meV over both: b has none"]


def test_oc20s_splits_are_recognised_only_when_all_four_are_there(caplog):
    caplog.set_level("INFO")
    assert split_groups({}, [*OC20, "other"]) == [SplitGroup("oc20-test", tuple(OC20))]
    assert "OC20's four splits, their mean is oc20-test" in caplog.text
    assert split_groups({}, OC20[:3]) == []
    assert split_groups({"mine": OC20[::-1]}, OC20) == [SplitGroup("mine", tuple(OC20[::-1]))]
    assert split_groups({}, [*OC20, "oc20-test"]) == []


def test_groups_as_they_are_written():
    assert parse_groups(["hot=a, b", "all=a,b,c"]) == {"hot": ("a", "b"), "all": ("a", "b", "c")}
    for text in ("hot", "hot=", "=a,b", "hot=,"):
        with pytest.raises(ConfigError, match="write it as NAME=SET,SET"):
            parse_groups([text])
    with pytest.raises(ConfigError, match="twice"):
        parse_groups(["hot=a", "hot=b"])


@pytest.mark.parametrize(
    ("group", "says"),
    [
        (("a", "x"), r"no test set is called x; there are a, b"),
        (("a", "a"), r"once"),
        ((), r"once"),
    ],
)
def test_groups_that_make_no_sense(group, says):
    with pytest.raises(ConfigError, match=says):
        split_groups({"g": group}, ["a", "b"])
    with pytest.raises(ConfigError, match="a test set has this name"):
        split_groups({"a": ("a", "b")}, ["a", "b"])


def test_settings_of_a_run_are_checked():
    base = {"store": "s", "out": "o", "student": "painn-tiny", "test": {"a": "a.xyz", "b": "b.xyz"}}
    config = make_config(TrainConfig, base, {"test_groups": {"both": ["a", "b"]}})
    assert config.test_groups == {"both": ("a", "b")}
    with pytest.raises(ConfigError, match="group both: no test set is called c; there are a, b"):
        make_config(TrainConfig, base, {"test_groups": {"both": ["a", "c"]}})


@pytest.fixture
def runs(make_run):
    """Two seeds without and two with KD, on two test sets; their energies in meV stand below."""
    energies = {
        ("no", 0): (40, 80), ("no", 1): (44, 84), ("kd", 0): (30, 50), ("kd", 1): (20, 66),
    }  # fmt: skip
    folders = []
    for (kind, seed), values in energies.items():
        folder = make_run(
            f"{kind}{seed}", seed=seed, kd=[N2N] if kind == "kd" else [], tests=("a", "b"),
            test={"a": "a.xyz", "b": "b.xyz"}, test_groups={"both": ["a", "b"]},
        )  # fmt: skip
        final = json.loads((folder / "metrics.json").read_text())
        final["test"] = {name: _values(e, 30.0) for name, e in zip("ab", values, strict=True)}
        (folder / "metrics.json").write_text(json.dumps(final))
        folders.append(folder)
    return folders


TEACHER = TeacherResult("big", {"a": _values(10, 10), "b": _values(30, 10)})


def test_table_of_means_by_hand(runs, tmp_path):
    report = write_report(runs, tmp_path / "out", teacher=TEACHER)
    assert list(report.tables) == ["both", "a", "b"]
    teacher, without, with_kd = report.tables["both"]
    assert teacher.metrics["energy_mae_meV"].mean == 20
    # Means over splits are 60 and 64 without KD, 40 and 43 with it; spreads 4/sqrt(2) and 3/sqrt(2).
    assert without.values["energy_mae_meV"] == [60, 64]
    assert with_kd.values["energy_mae_meV"] == [40, 43]
    assert without.metrics["energy_mae_meV"].spread == pytest.approx(4 / 2**0.5)
    assert with_kd.metrics["energy_mae_meV"].spread == pytest.approx(3 / 2**0.5)
    # (62 - 41.5) / (62 - 20); the mean of the splits' shares would be another number
    assert with_kd.gaps["energy_mae_meV"].percent == pytest.approx(100 * 20.5 / 42)
    assert not [r for r in report.remarks if "no mean" in r]


def test_a_run_without_a_split_is_named_and_has_no_mean(runs, tmp_path):
    final = json.loads((runs[2] / "metrics.json").read_text())
    del final["test"]["b"]
    (runs[2] / "metrics.json").write_text(json.dumps(final))
    report = write_report(runs, tmp_path / "out", teacher=TEACHER)
    assert report.tables["both"][2].values["energy_mae_meV"] == [43]
    assert f"{runs[2]}: no mean over both: b was not measured" in report.remarks


def test_one_name_for_two_groups(runs, make_run, tmp_path):
    other = make_run("other", seed=5, tests=("a",), test={"a": "a.xyz"}, test_groups={"both": ["a"]})
    with pytest.raises(ConfigError, match="other: the group both is a, in another run it is a, b; "):
        write_report([*runs, other], tmp_path / "out")
    report = write_report([*runs, other], tmp_path / "out", test_groups={"both": ["b", "a"]})
    assert next(iter(report.tables)) == "both"
