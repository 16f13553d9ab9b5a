"""A study from its file to its tables: what is made, skipped, continued, refused and told."""

import csv
import json
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from study_cases import SMALL_TEACHER

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm, make_config, read_yaml
from molkd.pipeline.distill import train
from molkd.pipeline.distill.run_folder import RunFolder
from molkd.pipeline.errors import CacheError, ConfigError, DataError, ModelError
from molkd.pipeline.evaluation import figures
from molkd.pipeline.evaluation.document import Picture
from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.study import run
from molkd.pipeline.study.dry_run import dry_run
from molkd.pipeline.study.options import StudyOptions
from molkd.pipeline.study.run import prepare_study, report_study, run_study
from molkd.pipeline.study.schema import StudyConfig
from molkd.pipeline.study.state import FAILED, State, read_failure

ALONE = StudyOptions(jobs=1)


def summaries(study, line):
    return [json.loads(p.read_text()) for p in sorted((study.out / "runs" / line).glob("seed*/metrics.json"))]


def test_runs_and_tables(study, runs_here, material):
    """Every number of study.csv against the runs' own files."""
    small = study(strategies={"none": [], "n2n": "n2n"}, settings={"data": {"all": {}}})
    done = run_study(small, ALONE)
    assert (done.n_runs, done.n_finished, done.failed, done.skipped, done.waiting) == (4, 4, {}, {}, [])
    assert len(runs_here) == 4
    table = (small.out / "report" / "study.csv").read_text().splitlines()
    rows = {row["strategy"]: row for row in csv.DictReader(table)}
    assert list(rows) == ["teacher", "none", "n2n"]
    key = "energy_mae_meV"
    errors = {
        name: [s["test"]["test"][key] for s in summaries(small, f"p/{name}__all")] for name in ("none", "n2n")
    }
    teacher = float(rows["teacher"][key])
    without = statistics.mean(errors["none"])
    for name, values in errors.items():
        mean = statistics.mean(values)
        assert float(rows[name][key]) == pytest.approx(mean)
        assert float(rows[name][f"{key}_spread"]) == pytest.approx(statistics.stdev(values))
        assert (rows[name]["seeds"], rows[name]["missing"], rows[name]["data"]) == ("2", "", "test")
        assert rows[name]["settings.data"] == "all"
        gap = rows[name][f"gap_closed_percent_{key}"]
        if name != "none" and gap:  # the random teacher may be no better than a student after two steps
            assert float(gap) == pytest.approx(100 * (without - mean) / (without - teacher))
    page = (small.out / "report" / "study.md").read_text()
    assert "## p, test" in page
    assert "[Report of p](p/report.html)" in page
    said = page.split("```yaml\n")[1].split("```")[0]
    assert make_config(StudyConfig, yaml.safe_load(said)) == small
    marked = {name: next(x for x in page.splitlines() if x.startswith(f"| {name} all |")) for name in errors}
    best = min(errors, key=lambda name: statistics.mean(errors[name]))
    assert {name: line.split("|")[3].strip()[-1] == "★" for name, line in marked.items()} == {
        name: name == best for name in errors
    }
    html = (small.out / "report" / "study.html").read_text()
    assert '<a href="p/report.html">' in html
    assert "★" in html
    assert (small.out / "report" / "p" / "report.html").exists()
    assert "4 of 4 runs finished" in done.text()
    kept = small.out / "report" / "teachers" / "big" / "test.npz"
    assert Evaluation.load(kept).to_report()["energy_mae_meV"] == pytest.approx(teacher)
    assert json.loads(json.dumps(done.to_dict()))["lines"][1]["strategy"] == "none"


def test_the_same_command_does_what_is_missing(study, runs_here, no_tables):
    """Another strategy, another seed: what has finished is not made again, nor touched."""
    run_study(study(strategies={"none": []}, seeds=1, test={}), ALONE)
    first = study().out / "runs" / "p" / "none" / "seed0"
    before = (first / "metrics.json").read_bytes(), (first / "best.safetensors").read_bytes()
    runs_here.clear()
    assert run_study(study(strategies={"none": [], "n2n": "n2n"}, test={}), ALONE).n_finished == 4
    assert [Path(*p.parts[-2:]).as_posix() for p in runs_here] == ["n2n/seed0", "none/seed1", "n2n/seed1"]
    assert ((first / "metrics.json").read_bytes(), (first / "best.safetensors").read_bytes()) == before


def test_only_and_arrays_share_the_runs(study, runs_here, no_tables):
    """Two jobs of an array make every run once; the tables come when nothing is missing any more."""
    few = study(test={}, seeds=1)
    parts = []
    for index in range(2):
        runs_here.clear()
        run_study(few, StudyOptions(jobs=1, worker=(index, 2)))
        parts.append(set(runs_here))
        assert len(no_tables) == (index == 1)
    assert sorted(map(len, parts)) == [1, 2]
    assert len(set.union(*parts)) == 3
    done = run_study(study(name="other", test={}, seeds=1), StudyOptions(jobs=1, only="n2n*"))
    assert (done.n_finished, done.waiting) == (2, ["p/none/seed0"])
    assert [s.state for s in no_tables[1]] == [State.NEW, State.FINISHED, State.FINISHED]


def diverge(monkeypatch, *, seed):
    """Have the loss of a seed's runs become infinite."""
    step = train.train_step

    def spoiled(state, sample, config, *arguments):
        terms = step(state, sample, config, *arguments)
        return terms._replace(total=terms.total * torch.inf) if config.seed == seed else terms

    monkeypatch.setattr(train, "train_step", spoiled)


def test_a_run_that_diverges_stops_nothing_else(study, runs_here, monkeypatch):
    few = study(strategies={"n2n": "n2n"}, test={})
    with monkeypatch.context() as patch:
        diverge(patch, seed=0)
        done = run_study(few, ALONE)
    assert (done.n_finished, list(done.failed)) == (1, ["p/n2n/seed0"])
    assert "the loss is not finite" in done.failed["p/n2n/seed0"]
    assert "failed runs (1)" in done.text()
    line = done.tables.to_dict()[-1]
    assert (line["strategy"], line["seeds"], line["missing"]) == ("n2n", 1, "seed 0 diverged")
    runs_here.clear()
    monkeypatch.setattr(run, "write_tables", lambda *_: None)
    again = run_study(few, ALONE)  # it would diverge again
    assert (runs_here, list(again.failed)) == ([], ["p/n2n/seed0"])
    cured = run_study(few, StudyOptions(jobs=1, retry=True))
    assert (cured.n_finished, cured.failed) == (2, {})
    assert not list(few.out.rglob(FAILED))


def test_what_failed_otherwise_is_tried_again(study, runs_here, no_tables, monkeypatch):
    few = study(strategies={"none": []}, seeds=1, test={})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", full)
        done = run_study(few, ALONE)
    assert "No space left" in done.failed["p/none/seed0"]
    assert read_failure(few.out / "runs/p/none/seed0").kind == "error"
    assert run_study(few, ALONE).n_finished == 1


def test_a_run_of_another_process_is_left_to_it(study, runs_here, no_tables):
    few = study(strategies={"none": [], "n2n": "n2n"}, seeds=1, test={})
    taken = few.out / "runs" / "p" / "none" / "seed0"
    taken.mkdir(parents=True)
    with RunFolder(taken).locked():
        done = run_study(few, ALONE)
        assert dry_run(few, ALONE).lines[0].states == {State.RUNNING.value: 1}
    assert (done.n_finished, done.waiting) == (1, ["p/none/seed0"])
    assert run_study(few, ALONE).n_finished == 2


def test_folders_with_other_settings_are_kept(study, runs_here, no_tables):
    few = study(strategies={"none": []}, seeds=2, test={})
    run_study(few, ALONE)
    other = study(strategies={"none": []}, seeds=2, test={}, steps=3)
    for act in (run_study, prepare_study, report_study, dry_run):
        with pytest.raises(
            ConfigError, match=r"seed0: holds a run with other settings \(training\), as do 1 more"
        ):
            act(other, ALONE)
    assert json.loads((few.out / "runs/p/none/seed0/metrics.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"store": "/none/s.kdcache"}, CacheError, r"s\.kdcache: no store; make it with kd ingest, or say"),
        ({"val": "/none/v.extxyz"}, DataError, r"v\.extxyz: validation or test data of the study"),
        ({"test_groups": {"all": ["tast"]}}, ConfigError, "tast"),
        ({"teachers": {"big": {"model": "gone.safetensors"}}}, DataError, "gone.*: model of teacher big"),
        ({"strategies": {"e2e": "e2e"}, "teachers": {}}, CacheError, "lacks edge"),
        (
            {"data": {"files": "/none/other.extxyz"}},
            CacheError,
            "made from train, the study's data are other",
        ),
    ],
)
def test_nothing_begins_before_all_is_in_order(study, runs_here, change, error, says):
    wrong = study(**change)
    with pytest.raises(error, match=says):
        run_study(wrong, ALONE)
    assert runs_here == []
    assert not (wrong.out / "runs").exists()


def test_from_files_to_tables(study, runs_here, no_tables, material, tmp_path):
    """The store is made, a teacher trained on it, its signals cached, and none of it twice."""
    whole = study(
        store=str(tmp_path / "own.kdcache"),
        data={"files": str(material / "train.extxyz")},
        teachers={"new": {"train": {"preset": "painn-tiny", "steps": 3, "set": SMALL_TEACHER}}},
        pairs=[{"teacher": "new", "student": "painn-tiny", "name": "p"}],
        strategies={"none": [], "v2v": "v2v"},
        seeds=1,
    )
    array = StudyOptions(jobs=1, worker=(0, 2))
    with pytest.raises(ConfigError, match=r"would each do stage one \(the store is made\); .*--prepare"):
        run_study(whole, array)
    with pytest.raises(ConfigError, match="--only n2m: fits no run"):
        run_study(whole, StudyOptions(only="n2m"))
    planned = dry_run(whole, ALONE)
    assert planned.stage_one == [
        "the store is made", "teacher new is trained", "v2v of teacher new are cached"
    ]  # fmt: skip
    assert planned.seconds is None
    assert not (tmp_path / "own.kdcache").exists()
    assert prepare_study(whole, ALONE).waiting == ["p/none/seed0", "p/v2v/seed0"]
    cache = Cache.open(tmp_path / "own.kdcache")
    assert cache.n_systems == 60
    assert set(cache.teachers["new"].signals) == {"v2v"}
    assert [p.relative_to(whole.out).as_posix() for p in runs_here] == ["teachers/new"]
    assert run_study(whole, array).n_finished == 1
    assert run_study(whole, StudyOptions(jobs=1, worker=(1, 2))).n_finished == 2
    assert len(runs_here) == 3
    assert [[s.state for s in standings] for standings in no_tables] == [[State.FINISHED] * 2]


def test_another_teacher_than_the_cached_one_is_refused(study, runs_here, no_tables, material, tmp_path):
    """Students would learn from one and be measured against another; before anything is trained."""
    training = {"preset": "painn-tiny", "steps": 3, "set": SMALL_TEACHER}
    whole = {
        "store": str(tmp_path / "own.kdcache"),
        "data": {"files": str(material / "train.extxyz")},
        "pairs": [{"teacher": "new", "student": "painn-tiny", "name": "p"}],
        "strategies": {"v2v": "v2v"},
        "seeds": 1,
        "test": {},
    }
    first = study(**whole, out=str(tmp_path / "a"), teachers={"new": {"train": training}})
    assert run_study(first, ALONE).n_finished == 1
    n_started = len(runs_here)
    longer = {"new": {"train": training | {"steps": 4}}}
    for out, teachers, error, says in (
        ("a", longer, ConfigError, r"a/teachers/new: holds a run with other settings \(training\)"),
        (
            "b",
            longer,
            CacheError,
            r"holds signals of a teacher new already, and .*b/teachers/new is still to",
        ),
        (
            "b",
            {"new": {"model": str(material / "big.safetensors")}},
            CacheError,
            "teacher new are by weights",
        ),
    ):
        other = study(**whole, out=str(tmp_path / out), teachers=teachers)
        for act in (run_study, prepare_study, report_study, dry_run):
            with pytest.raises(error, match=says):
                act(other, ALONE)
    assert len(runs_here) == n_started
    again = study(
        **whole, out=str(tmp_path / "b"), teachers={"new": {"model": str(tmp_path / "a/teachers/new")}}
    )
    assert run_study(again, ALONE).n_finished == 1


def test_further_stores_are_looked_at_before_a_teacher_is_trained(study, runs_here, no_tables):
    """But a part of the study that does not need them can be made, to make them from."""
    few = study(
        teachers={"new": {"train": {"preset": "painn-tiny", "steps": 3, "set": SMALL_TEACHER}}},
        pairs=[{"teacher": "new", "student": "painn-tiny", "name": "p"}],
        strategies={"none": []},
        settings={"data": {"all": {}, "more": {"mix": [{"store": "more.kdcache"}]}}},
        seeds=1,
        test={},
    )
    with pytest.raises(
        CacheError, match=r"more\.kdcache: a further store .*there is none; make it with kd aug"
    ):
        run_study(few, ALONE)
    assert dry_run(few, ALONE).stage_one[-1].endswith("more.kdcache is made, with kd augment or kd ingest")
    assert runs_here == []
    assert run_study(few, StudyOptions(jobs=1, only="all")).waiting == ["p/none__more/seed0"]
    assert [p.relative_to(few.out).as_posix() for p in runs_here] == [
        "teachers/new",
        "runs/p/none__all/seed0",
    ]


def test_a_teacher_that_cannot_be_trained(study, runs_here, material, tmp_path, monkeypatch):
    diverge(monkeypatch, seed=0)
    training = {"preset": "painn-tiny", "steps": 3, "set": SMALL_TEACHER}
    pairs = [{"teacher": "new", "student": "painn-tiny", "name": "p"}]
    whole = study(teachers={"new": {"train": training}}, pairs=pairs)
    with pytest.raises(ModelError, match=r"teachers/new: the teacher could not be trained: .*not finite"):
        run_study(whole, ALONE)
    assert not (whole.out / "runs").exists()


def test_dry_run_writes_nothing_and_knows_what_is_done(study, runs_here, no_tables, material):
    few = study(strategies={"none": [], "n2n": "n2n"}, test={})
    empty = dry_run(few, ALONE)
    assert not few.out.exists()
    assert [(line.line, line.runs, line.states) for line in empty.lines] == [
        ("p/none", 2, {"new": 2}),
        ("p/n2n", 2, {"new": 2}),
    ]
    assert (empty.n_runs, empty.n_to_make, empty.jobs, empty.stage_one) == (4, 4, 1, [])
    assert empty.seconds > 0  # of a probe
    run_study(few, StudyOptions(jobs=1, only="seed0"))
    half = dry_run(few, StudyOptions(jobs=5))
    assert [line.states for line in half.lines] == [{"finished": 1, "new": 1}] * 2
    assert (half.n_to_make, half.jobs) == (2, 2)
    seconds = [summaries(few, f"p/{name}")[0]["seconds"] for name in ("none", "n2n")]
    assert [line.seconds for line in half.lines] == pytest.approx(seconds)
    assert half.seconds == pytest.approx(max(seconds))  # side by side
    assert "2 of 4 runs to make, 2 side by side" in half.text()


def test_space_on_disk(study, runs_here, no_tables):
    """At a size where numbers outweigh names; raw and averaged weights, AMSGrad's moments, the model."""
    one = study(strategies={"none": []}, seeds=1, test={}, set={"training.batch_size": 4}, steps=1)
    expected = dry_run(one, ALONE).bytes
    run_study(one, ALONE)
    files = [f for f in one.out.rglob("*") if f.name in ("last.pt", "best.safetensors")]
    assert len(files) == 2
    assert sum(f.stat().st_size for f in files) == pytest.approx(expected, rel=0.1)


def test_runs_that_choose_their_losses_themselves(study, runs_here, no_tables, tmp_path):
    """They get the signals to choose from, and their folders still count as theirs when they have chosen."""
    few = study(strategies={"none": [], "auto": "auto"}, seeds=1, test={})
    assert dry_run(few, ALONE).lines[1].seconds > 0
    for _ in range(2):
        assert run_study(few, ALONE).n_finished == 2
    assert len(runs_here) == 2
    chosen = read_yaml(few.out / "runs/p/auto/seed0/config.yaml")
    assert [term["name"] for term in chosen["kd"]] == ["grad", "n2n", "v2v"]
    assert (chosen["teacher"], chosen["kd_auto"]) == ("big", True)
    whole = study(
        store=str(tmp_path / "new.kdcache"), data={"files": "train.extxyz"}, strategies={"auto": "auto"}
    )
    missing = dry_run(whole, ALONE).stage_one
    assert missing == ["the store is made", "energy, forces, node, v2v of teacher big are cached"]


def test_a_strategy_that_auto_came_to(study, runs_here, monkeypatch):
    """Two runs of the same settings and seed: a report refuses the second, the tables have both lines."""
    monkeypatch.setattr(figures, "save_picture", lambda _, __, path, alt: Picture(path, alt, "<svg/>", 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_tables", lambda *_: None)
        run_study(study(strategies={"auto": "auto"}, seeds=1, test={}), ALONE)
    chosen = read_yaml(study().out / "runs/p/auto/seed0/config.yaml")["kd"]
    both = {"none": [], "auto": "auto", "same": [KDTerm(**term).text for term in chosen]}
    done = run_study(study(strategies=both, seeds=1, test={}), ALONE)
    assert len(runs_here) == 3
    lines = {line["strategy"]: line for line in done.tables.to_dict()}
    assert [lines[name]["seeds"] for name in both] == [1, 1, 1]
    errors = [lines[name]["energy_mae_meV"] for name in both]
    assert errors[0] != errors[1] == errors[2]


def test_tables_alone(study, runs_here, no_tables):
    few = study(strategies={"none": []}, seeds=1, test={})
    with pytest.raises(CacheError, match="no store yet"):
        report_study(study(store="/none/s.kdcache", data={"files": "a"}, test={}), ALONE)
    assert report_study(few, ALONE).waiting == ["p/none/seed0"]
    run_study(few, ALONE)
    runs_here.clear()
    assert report_study(few, ALONE).n_finished == 1
    assert runs_here == []
    assert [[s.state for s in standings] for standings in no_tables] == [
        [State.NEW],
        [State.FINISHED],
        [State.FINISHED],
    ]
