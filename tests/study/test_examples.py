"""The studies that come with the package: each can be read, and stands for the runs counted by hand."""

import pytest
from study_cases import names

from molkd.pipeline.errors import ConfigError
from molkd.pipeline.study.dry_run import dry_run
from molkd.pipeline.study.grid import cells_of, runs_of
from molkd.pipeline.study.options import StudyOptions
from molkd.pipeline.study.preparing import missing_of, teacher_run
from molkd.pipeline.study.reading import read_study
from molkd.pipeline.study.run import run_study
from molkd.pipeline.study.schema import without_weight
from molkd.pipeline.study.shipped import copy_example, describe_examples, example_names, example_text
from molkd.pipeline.study.tables import study_file

COUNTS = {
    "molecules": 3 * (2 * 4),  # of which SchNet's n2n+v2v are left out when the store is there
    "table3-oc20": 3 * (6 + 5 + 4 + 4),
    "table3-oc20like": 3 * (2 * 7),
    "table12-coll": 3 * (5 + 4 + 6),
    "table12-coll-gfn2": 3 * (5 + 4 + 5),  # the student without KD is that of the first pair
    "transformations": 3 * (6 + 3),
    "transformations-laptop": 3 * (6 + 3),
    "losses": 3 * 5,
    "losses-laptop": 3 * 5,
    "features": 3 * 9,
    "features-laptop": 3 * 10,
    "weights": 3 * 8,
    "weights-laptop": 3 * 8,
    "augmentation": 3 * (2 + 3 * 2),
    "augmentation-laptop": 3 * (2 + 3 * 2),
}


@pytest.fixture
def example(tmp_path):
    """Read an example, with another value for some keys of the file."""

    def read(name, *assignments):
        path = tmp_path / f"{name}.yaml"
        path.write_text(example_text(name))
        return read_study(path, assignments)

    return read


def test_every_example_is_counted():
    assert set(example_names()) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_runs(example, name):
    study = example(name)
    assert study.name == name
    assert len(names(study)) == COUNTS[name]
    for teacher, spec in study.teachers.items():
        if spec.train is not None:
            assert teacher_run(study, teacher, periodic=False).config.kd == ()


@pytest.mark.parametrize("name", COUNTS)
def test_what_the_page_says_is_the_same_study(example, name, tmp_path):
    study = example(name, "steps=7", "seeds=[4, 1]")
    elsewhere = tmp_path / "other" / "study.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(study_file(study))
    assert read_study(elsewhere) == study


def test_weights_of_table_7(example):
    """As the official configs have them, and `auto` where they have none."""
    study = example("table3-oc20")
    weights = {
        (run.config.student, run.config.kd[0].name): run.config.kd[0].weight
        for run in runs_of(study, cells_of(study), periodic=True)
        if run.config.kd
    }
    assert weights == {
        ("painn-big-oc20", "vanilla1"): "auto",
        ("painn-big-oc20", "vanilla2"): "auto",
        ("painn-big-oc20", "n2n"): 10000,
        ("painn-big-oc20", "e2n"): 10,
        ("painn-big-oc20", "v2v"): "auto",
        ("painn-small-oc20", "vanilla1"): "auto",
        ("painn-small-oc20", "vanilla2"): "auto",
        ("painn-small-oc20", "n2n"): 10000,
        ("painn-small-oc20", "v2v"): "auto",
        ("schnet-oc20", "vanilla1"): "auto",
        ("schnet-oc20", "vanilla2"): "auto",
        ("schnet-oc20", "n2n"): 100,
        ("gemnet-oc-small-oc20", "vanilla1"): 0.7,
        ("gemnet-oc-small-oc20", "vanilla2"): 1,
        ("gemnet-oc-small-oc20", "n2n"): 10,
    }
    coll = example("table12-coll")
    by_pair = {pair.student: pair.lambdas for pair in coll.pairs}
    assert by_pair["painn-small-coll"] == {"vanilla1": 1, "vanilla2": 200, "n2n": 10000, "v2v": 1}
    assert by_pair["schnet-coll"] == {"vanilla1": 1, "vanilla2": "auto", "n2n": 100}
    assert by_pair["painn-big-coll"]["n2n"] == 100


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("transformations", {"n2n", "n2n,head=identity", "n2n,head=mlp"}),
        ("losses", {"n2n"}),
        ("features", {"n2n", "n2n:U2", "n2n:U1", "n2n:U2+U4", "n2n:U1+U2+U3+U4"}),
        ("augmentation", {"n2n"}),
    ],
)
def test_an_ablation_has_the_known_weight_where_the_same_is_compared(example, name, known):
    """With MSE the teacher's last layer has one scale, whatever the head and the student's layer."""
    study = example(name)
    weights = {
        without_weight(term.text): term.weight
        for run in runs_of(study, cells_of(study), periodic=False)
        for term in run.config.kd
    }
    assert {label for label, weight in weights.items() if weight == 10000} == known
    assert {weights[label] for label in weights.keys() - known} <= {"auto"}


def test_signals_are_those_that_the_strategies_learn_from(example):
    study = example("features-laptop")
    missing = missing_of(study, None, runs_of(study, cells_of(study), periodic=False))
    assert missing.signals == {"painn-medium": ("layer/U1", "layer/U2", "node")}
    assert missing.store


def test_copies(tmp_path):
    copy_example("molecules", tmp_path / "new" / "study.yaml")
    assert (tmp_path / "new" / "study.yaml").read_text() == example_text("molecules")
    with pytest.raises(ConfigError, match=r"study\.yaml: is there already"):
        copy_example("losses", tmp_path / "new" / "study.yaml")


def test_words(example):
    assert describe_examples()["table3-oc20"].startswith("Table 3: ")
    assert all(len(line) < 125 for line in describe_examples().values())
    with pytest.raises(ConfigError, match=r"--example table13: no such study; did you mean table1?"):
        example_text("table13")


@pytest.mark.slow
def test_the_bundled_one_from_files_to_tables(example, runs_here):
    """At reduced length; SchNet's v2v is left out with a reason."""
    study = example("molecules", "steps=4", "seeds=1", "set.training.batch_size=4")
    assert dry_run(study, StudyOptions()).stage_one == [
        "the store is made",
        "energy, forces, node, v2v of teacher painn-medium are cached",
    ]
    done = run_study(study, StudyOptions(jobs=1))
    assert (done.n_runs, done.n_finished) == (7, 7)
    assert list(done.skipped) == ["painn-medium-to-schnet-tiny/n2n+v2v"]
    lines = done.tables.to_dict()
    assert [line["strategy"] for line in lines] == [
        *("teacher", "none", "vanilla1", "n2n", "n2n+v2v"),
        *("teacher", "none", "vanilla1", "n2n"),
    ]
    assert lines[0]["energy_mae_meV"] < 200  # the bundled teacher's own, see its README
    assert all(
        line["gap_closed_percent_energy_mae_meV"] is not None for line in lines if line["strategy"] == "n2n"
    )
