"""Reports: hand-worked table, remarks, files, and that every picture shows the data it was given."""

import csv
import json
import re

import numpy as np
import pytest

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.groups import comparisons, group_runs
from molkd.pipeline.evaluation.parity_plots import MAX_POINTS, Panel, plot_parity
from molkd.pipeline.evaluation.plots import mean_curve, plot_errors, plot_learning_curves, save_figure
from molkd.pipeline.evaluation.report import write_report
from molkd.pipeline.evaluation.result import FOLDER
from molkd.pipeline.evaluation.results import TeacherResult, build_rows
from molkd.pipeline.evaluation.runs import read_run

N2N = {"name": "n2n", "weight": "auto", "head": "linear", "loss": "mse"}
V2V = {"name": "v2v", "weight": 1.0, "head": "linear", "loss": "mse"}
TEACHER = TeacherResult("big", {"test": {"energy_mae_meV": 20.0, "force_mae_meV_A": 10.0}}, n_parameters=5000)
MIN_PNG_BYTES = 5_000  # an empty canvas of these sizes compresses to less


@pytest.fixture
def runs(make_run):
    """Without KD 48, 50, 52 meV and 39, 40, 41 meV/A; n2n 34, 35, 36 meV and 32.5 meV/A three times."""
    return [
        *(make_run(f"no{s}", seed=s, energy=48.0 + 2 * s, force=39.0 + s) for s in range(3)),
        *(make_run(f"kd{s}", seed=s, kd=[N2N], energy=34.0 + s, force=32.5) for s in range(3)),
    ]


def test_table_by_hand(runs, tmp_path):
    report = write_report(runs, tmp_path / "out", teacher=TEACHER)
    teacher, without, with_kd = report.tables["test"]
    assert (teacher.role, without.role, with_kd.role) == ("teacher", "without KD", "with KD")
    assert without.metrics["energy_mae_meV"].mean == pytest.approx(50)
    assert without.metrics["energy_mae_meV"].spread == pytest.approx(2)
    # (50 - 35) / (50 - 20) and (40 - 32.5) / (40 - 10)
    assert with_kd.gaps["energy_mae_meV"].percent == pytest.approx(50)
    assert with_kd.gaps["force_mae_meV_A"].percent == pytest.approx(25)
    # 100/30 * sqrt(1^2 + (15/30 * 2)^2) and 100/30 * (22.5/30 * 1)
    assert with_kd.gaps["energy_mae_meV"].spread == pytest.approx(100 / 30 * 2**0.5)
    assert with_kd.gaps["force_mae_meV_A"].spread == pytest.approx(2.5)
    assert report.remarks == []


def test_written_files_say_the_same(runs, tmp_path):
    out = tmp_path / "out"
    report = write_report(runs, out, teacher=TEACHER)
    results = json.loads((out / "results.json").read_text())
    assert results["tables"]["test"][2]["gaps"]["energy_mae_meV"]["percent"] == pytest.approx(50)
    assert "student without KD − teacher" in results["formula"]
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [row["role"] for row in rows] == ["teacher", "without KD", "with KD"]
    assert float(rows[2]["gap_closed_percent_energy_mae_meV"]) == pytest.approx(50)
    assert rows[0]["gap_closed_percent_energy_mae_meV"] == ""
    page = (out / "report.md").read_text()
    assert "| painn-small, n2n=auto | 3 | 35.0 ± 1.0 | 32.5 ± 0.0 |" in page
    assert results["formula"] in page
    assert results["formula"] in report.text()
    assert "50.0 ± 4.7" in report.text()
    linked = re.findall(r"\]\((plots/.*?\.png)\)", page)
    assert sorted(linked) == sorted(results["plots"])
    for link in linked:
        assert (out / link).stat().st_size > MIN_PNG_BYTES


def test_evaluations_in_the_run_folders_give_metrics_and_parity_plots(make_run, make_evaluation, tmp_path):
    folders = [make_run("no", tests=()), make_run("kd", kd=[N2N], tests=())]
    for folder, error in zip(folders, (0.05, 0.03), strict=True):
        make_evaluation(error, error).save(folder / FOLDER / "hot.npz")
    teacher = TeacherResult("big", evaluations={"hot": make_evaluation(0.01, 0.01)})
    report = write_report(folders, tmp_path / "out", teacher=teacher)
    assert list(report.tables) == ["hot"]
    assert report.tables["hot"][2].gaps["force_mae_meV_A"].percent == pytest.approx(50)
    assert report.tables["hot"][2].systems_per_second.mean == 100.0
    assert [p.name for _, p in report.plots] == [
        "learning_curves.png", "errors_hot.png", "parity_energy_hot.png", "parity_forces_hot.png",
    ]  # fmt: skip


def test_pictures_stay_with_their_data_set(make_run, tmp_path):
    write_report([make_run("a", tests=("test", "test_600K"))], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    first, second = page.split("## test_600K")
    assert "errors_test.png" in first
    assert "errors_test_600K.png" not in first
    assert "errors_test_600K.png" in second


def test_without_test_sets_the_validation_set_is_reported(make_run, tmp_path):
    report = write_report([make_run("a", tests=())], tmp_path / "out")
    assert report.tables["validation"][0].metrics["force_mae_meV_A"].mean == 40.0


def test_doubtful_numbers_are_remarked_upon(make_run, tmp_path):
    runs = [
        make_run("no", force=9.0),
        make_run("kd", kd=[N2N], lr=5e-4),
        make_run("s", kd=[N2N], student="schnet"),
    ]
    remarks = "\n".join(write_report(runs, tmp_path / "out", teacher=TEACHER).remarks)
    assert "no gap: the student without KD is as good as the teacher" in remarks
    assert "fewer than 3 seeds" in remarks
    assert "training.lr: 0.0005, without KD 0.001" in remarks
    assert "schnet, n2n=auto, test, gap closed, energy (%): no runs of this student without KD" in remarks


def test_diverged_run_is_visible_and_the_json_stays_valid(make_run, tmp_path):
    out = tmp_path / "out"
    report = write_report(
        [make_run("no"), make_run("kd", kd=[N2N], energy=float("nan"))], out, teacher=TEACHER
    )
    assert "nan" in report.text()
    json.loads((out / "results.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def test_no_runs_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no runs"):
        write_report([], tmp_path)


def test_groups_with_kd_stand_behind_their_own_baseline(make_run):
    groups = group_runs(
        [
            read_run(make_run(f"{student}{len(kd)}", student=student, kd=kd))
            for student in ("painn-small", "schnet")
            for kd in ([], [N2N], [N2N, V2V])
            if not (student == "schnet" and not kd)
        ]
    )
    found = [(b.name if b else None, [g.name for g in with_kd]) for b, with_kd in comparisons(groups)]
    assert found == [
        ("painn-small, without KD", ["painn-small, n2n=auto", "painn-small, n2n=auto + v2v=1"]),
        (None, ["schnet, n2n=auto", "schnet, n2n=auto + v2v=1"]),
    ]


def test_curves_are_means_over_seeds_with_their_extremes(runs):
    curve = mean_curve(group_runs(map(read_run, runs[:3]))[0].runs, "force_mae_meV_A")
    np.testing.assert_array_equal(curve.steps, [100, 200, 300])
    np.testing.assert_array_equal(curve.seconds, [2, 4, 6])
    np.testing.assert_allclose(curve.mean, [160, 80, 40])
    np.testing.assert_allclose(curve.lowest, [156, 78, 39])
    np.testing.assert_allclose(curve.highest, [164, 82, 41])


def test_curves_of_unequal_length_end_where_all_seeds_still_run(runs):
    path = runs[1] / "metrics.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    curve = mean_curve([read_run(p) for p in runs[:3]], "force_mae_meV_A")
    assert curve.steps.tolist() == [100, 200]


def test_learning_curves_show_every_group_on_log_axes(runs):
    groups = group_runs(map(read_run, runs))
    axes = plot_learning_curves(groups).axes
    assert len(axes) == 4
    assert all(ax.get_yscale() == "log" and len(ax.lines) == 2 for ax in axes)
    assert {line.get_color() for line in axes[0].lines} != {axes[0].lines[0].get_color()}


def test_what_no_run_measured_is_left_out(make_run, tmp_path):
    nan = {"energy": 50.0, "force": None}
    report = write_report(
        [make_run("no", **nan), make_run("kd", kd=[N2N], **nan)], tmp_path / "out", teacher=TEACHER
    )
    row = report.tables["test"][2]
    assert set(row.gaps) == {"energy_mae_meV"}
    assert "forces (%)" not in report.text()
    assert len(plot_errors([r for r in report.tables["test"] if r.role != "teacher"]).axes) == 1


def test_without_validation_there_are_no_curves(runs):
    (runs[0] / "metrics.csv").unlink()
    assert plot_learning_curves(group_runs([read_run(runs[0])])) is None


def test_error_chart_holds_all_points_and_the_teacher(runs):
    rows = build_rows(group_runs(map(read_run, runs)), "test", TEACHER, {})
    energy, force = plot_errors(rows).axes
    for ax, teacher, worst in ((energy, 20.0, 52.0), (force, 10.0, 41.0)):
        low, high = ax.get_xlim()
        assert low == 0
        assert high > worst
        assert teacher in [line.get_xdata()[0] for line in ax.lines]
    assert [label.get_text() for label in energy.get_yticklabels()] == [
        "painn-small, without KD",
        "painn-small, n2n=auto",
    ]


@pytest.mark.parametrize("quantity", ["energy", "forces"])
def test_parity_panels_share_axes_that_hold_every_point(make_evaluation, quantity):
    panels = [Panel("teacher", make_evaluation(0.01, 0.01)), Panel("student", make_evaluation(0.9, 0.5))]
    figure = plot_parity(panels, quantity)
    tops = figure.axes[0:2]
    assert tops[0].get_xlim() == tops[1].get_xlim() == tops[0].get_ylim() == tops[1].get_ylim()
    for panel in panels:
        parity = panel.evaluation.parity
        if quantity == "energy":
            label, pred = parity.energy_label / parity.n_atoms, parity.energy_pred / parity.n_atoms
            label, pred = (1e3 * (v - (parity.energy_label / parity.n_atoms).mean()) for v in (label, pred))
        else:
            label, pred = parity.forces_label, parity.forces_pred
        low, high = tops[0].get_xlim()
        assert low < min(label.min(), pred.min())
        assert high > max(label.max(), pred.max())
    texts = [text.get_text() for ax in tops for text in ax.texts]
    assert (
        texts
        == {
            "energy": ["MAE 0.500 meV/atom", "MAE 45.0 meV/atom"],
            "forces": ["MAE 10.0 meV/Å", "MAE 500 meV/Å"],
        }[quantity]
    )


def test_many_points_become_a_density_with_one_scale(make_evaluation, tmp_path):
    few, many = make_evaluation(n_systems=10), make_evaluation(n_systems=60)
    assert few.parity.forces_pred.size <= MAX_POINTS < many.parity.forces_pred.size
    assert len(plot_parity([Panel("a", few)], "forces").axes) == 2
    figure = plot_parity([Panel("a", many), Panel("b", many)], "forces")
    assert len(figure.axes) == 5  # two rows of two, and the bar
    assert (
        sum(ax.collections[0].get_array().sum() for ax in figure.axes[:2]) == 2 * many.parity.forces_pred.size
    )
    save_figure(figure, tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > MIN_PNG_BYTES


def test_parity_without_labels_is_an_empty_picture(make_evaluation):
    evaluation = make_evaluation(n_systems=0)
    assert len(plot_parity([Panel("a", evaluation)], "energy").axes) == 2
