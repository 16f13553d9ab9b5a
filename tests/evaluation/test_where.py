"""Where the errors are, and what a report was made with: tables from evaluations."""

import json
import platform
from dataclasses import replace

import pytest
from made_systems import collected, made_systems

from molkd.pipeline.environment import environment
from molkd.pipeline.evaluation.breakdown import KINDS
from molkd.pipeline.evaluation.breakdown_tables import breakdown_blocks, evaluations_of
from molkd.pipeline.evaluation.cka_result import FOLDER as CKA_FOLDER
from molkd.pipeline.evaluation.collect import Collector
from molkd.pipeline.evaluation.document import Details
from molkd.pipeline.evaluation.groups import group_runs
from molkd.pipeline.evaluation.report import write_report
from molkd.pipeline.evaluation.results import TeacherResult, build_rows
from molkd.pipeline.evaluation.runs import read_run
from molkd.pipeline.evaluation.throughput import Conditions, Throughput

N2N = {"name": "n2n", "weight": "auto"}


@pytest.fixture(scope="module")
def measured():
    """What two seeds of one group and a teacher gave on 60 systems."""
    return [collected(Collector(seed, KINDS), made_systems(), 16) for seed in range(3)]


@pytest.fixture
def runs(make_run):
    return [make_run(f"kd{s}", seed=s, kd=[N2N], tests=()) for s in range(2)]


def blocks(runs, measured):
    evaluations = {run: {"hot": its} for run, its in zip(runs, measured, strict=False)}
    teacher = TeacherResult("T", evaluations={"hot": measured[2]})
    groups = group_runs(map(read_run, runs))
    rows = build_rows(groups, "hot", teacher, evaluations)
    found = list(breakdown_blocks("hot", rows, evaluations_of("hot", groups, teacher, evaluations)))
    assert all(isinstance(block, Details) for block in found)
    return {block.summary: block.blocks for block in found}


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_forces_by_element_are_those_of_the_breakdown(runs, measured):
    (table,) = blocks(runs, measured)["Errors by element"]
    assert table.titles == ("model", "H", "C", "O", "Mo")
    assert [row[0] for row in texts(table)] == ["teacher: T", "painn-small, n2n=auto"]
    expected = 1e3 * measured[0].breakdowns["element"].metrics()["H"].force_mae
    assert texts(table)[0][1] == f"{expected:.0f}" or texts(table)[0][1] == f"{expected:.1f}"
    assert texts(table)[1][1].endswith(("± 0", "± 0.0"))  # both seeds gave the same here


def test_systems_have_energies_and_forces_by_size(runs, measured):
    energy, forces = blocks(runs, measured)["Errors by number of atoms"]
    assert energy.caption == "energy MAE (meV) on hot by number of atoms"
    assert forces.caption == "force MAE (meV/Å) on hot by number of atoms"
    assert energy.titles[1:] == tuple(measured[0].breakdowns["size"].in_ranges().keys)


def test_a_breakdown_of_one_part_says_nothing(runs, measured):
    one = [replace(e, breakdowns={"element": replace_keys(e.breakdowns["element"])}) for e in measured]
    assert "Errors by element" not in blocks(runs, one)


def replace_keys(breakdown):
    return replace(breakdown, keys=breakdown.keys[:1], terms=breakdown.terms[:1])


def test_many_parts_are_cut_to_the_largest_and_counted(runs, measured):
    (table, _) = blocks(runs, measured)["Errors by formula"]
    n = len(measured[0].breakdowns["formula"].keys)
    assert n > 12
    assert len(table.titles) <= 13
    assert f"({n - 12} smaller groups are not shown)" in table.caption


def test_quantiles_and_worst_systems(runs, measured):
    found = blocks(runs, measured)
    energies, forces = found["How errors are spread"]
    assert energies.titles[:2] == ("model", "50 % (meV)")
    assert forces.titles[-2:] == ("largest (meV/Å)", "worst 1 % of errors hold (%)")
    by_energy, by_forces = found["The worst systems"]
    assert by_energy.caption == "Largest errors in energy on hot: painn-small, n2n=auto"
    worst = measured[0].worst["energy"][0]
    assert by_energy.rows[0][0].text == worst.source
    assert by_energy.rows[0][0].code
    assert len(by_forces.rows) == 10


def test_speeds_under_other_conditions_are_remarked_upon(make_run, make_evaluation, tmp_path):
    folders = [make_run("a", tests=()), make_run("b", kd=[N2N], tests=())]
    for folder, threads in zip(folders, (1, 2), strict=True):
        speed = Throughput.of([90.0, 100.0, 110.0], Conditions("CPU X", threads, 32, 20.0, "float32", "2.0"))
        replace(make_evaluation(), throughput=speed).save(folder / "evaluation" / "hot.npz")
    report = write_report(folders, tmp_path / "out")
    assert any(
        "on hot do not compare: measured under 2 different" in text and "--throughput" in text
        for text in report.remarks
    )
    assert [row["threads"] for row in report.origin.conditions] == ["1", "2"]
    assert {row["middle half of repeats (systems/s)"] for row in report.origin.conditions} == {"95 to 105"}
    page = report.page.read_text()
    assert "CPU X" in page


def test_spreads_of_speeds_take_all_seeds_together(make_run, make_evaluation, tmp_path):
    """By hand: quartiles of 90, 100, 110 are 95 and 105, those of 180, 200, 220 are 190 and 210."""
    folders = [make_run("a", seed=0, tests=()), make_run("b", seed=1, tests=())]
    for folder, factor in zip(folders, (1.0, 2.0), strict=True):
        rates = [90.0 * factor, 100.0 * factor, 110.0 * factor]
        speed = Throughput.of(rates, Conditions("CPU X", 1, 32, 20.0, "float32", "2.0"))
        replace(make_evaluation(), throughput=speed).save(folder / "evaluation" / "hot.npz")
    (row,) = write_report(folders, tmp_path / "out").origin.conditions
    assert (row["repeats"], row["middle half of repeats (systems/s)"]) == ("6", "95 to 210")


def test_origin_holds_versions_fingerprints_and_citations(make_run, tmp_path):
    folder = make_run("kd", kd=[N2N])
    final = json.loads((folder / "metrics.json").read_text())
    final |= {
        "environment": {"molkd": "9.9", "torch": "3.0"},
        "dataset_fingerprint": "ab" * 32,
        "teacher": {"name": "T", "weights_sha256": "cd" * 32, "citation": "T et al."},
        "data": {"citation": "D et al.", "licence": "MIT"},
    }
    (folder / "metrics.json").write_text(json.dumps(final))
    report = write_report([folder], tmp_path / "out")
    made, here = report.origin.environments
    assert (made["what"], made["molkd"], made["torch"]) == ("runs", "9.9", "3.0")
    assert here["python"] == platform.python_version()
    assert [row["sha256"] for row in report.origin.fingerprints] == ["ab" * 32, "cd" * 32]
    markdown = (tmp_path / "out" / "report.md").read_text()
    for text in ("T et al.", "D et al.", "2306.14818", "ab" * 32, "kd train-student acac.kdcache"):
        assert text in markdown


def test_environment_names_no_machine():
    facts = environment()
    assert {"molkd", "torch", "python", "platform"} == set(facts)
    assert not platform.node() or platform.node() not in " ".join(facts.values())


def test_heat_maps_of_runs_are_shown(make_run, tmp_path):
    folder = make_run("kd", kd=[N2N])
    content = {
        "a": "student <b>", "b": "teacher", "data": "test", "rows": ["layer/U1", "node"], "columns": ["node"],
        "values": [[0.5], [None]], "n_systems": 4, "n_atoms": 40, "n_batches": 2, "seed": 0,
        "a_weights_sha256": "", "b_weights_sha256": "",
    }  # fmt: skip
    (folder / CKA_FOLDER).mkdir()
    (folder / CKA_FOLDER / "teacher-on-test.json").write_text(json.dumps(content))
    report = write_report([folder], tmp_path / "out")
    assert "plots/cka_painn-small-n2n-auto_teacher-on-test.png" in report.plots
    assert "Similarity of layers (CKA)" in (tmp_path / "out" / "report.md").read_text()
