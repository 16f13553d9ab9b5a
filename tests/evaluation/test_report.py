"""Reports: hand-worked table, remarks, files, and that every picture shows the data it was given."""

import csv
import json
import re

import numpy as np
import pytest

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.curves import VALIDATION, kd_columns, mean_curve, plot_curves
from molkd.pipeline.evaluation.groups import comparisons, group_runs
from molkd.pipeline.evaluation.parity_plots import MAX_POINTS, Panel, plot_parity
from molkd.pipeline.evaluation.plots import pareto, plot_errors, plot_speed
from molkd.pipeline.evaluation.report import write_report
from molkd.pipeline.evaluation.result import FOLDER
from molkd.pipeline.evaluation.results import TeacherResult, build_rows
from molkd.pipeline.evaluation.runs import read_run
from molkd.pipeline.evaluation.style import COLORS, drawing, model_styles, save_picture, svg_of

N2N = {"name": "n2n", "weight": "auto", "head": "linear", "loss": "mse"}
V2V = {"name": "v2v", "weight": 1.0, "head": "linear", "loss": "mse"}
TEACHER = TeacherResult("big", {"test": {"energy_mae_meV": 20.0, "force_mae_meV_A": 10.0}}, n_parameters=5000)
MIN_PNG_BYTES = 5_000  # an empty canvas of these sizes compresses to less


@pytest.fixture(autouse=True)
def _settings():
    with drawing():
        yield


def styles(groups):
    return model_styles([group.name for group in groups])


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


def test_written_files_say_the_same(runs, tmp_path, real_pictures):
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
    assert "| painn-small, n2n=auto | 3 | **35.0 ± 1.0** ★ | **32.5 ± 0.0** ★ |" in page
    assert results["formula"][1:] in page
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
    models = range(1, 4)
    assert report.plots == [
        f"plots/{name}.png"
        for name in (
            "errors_energy_hot", "errors_force_hot", "speed_energy_hot", "speed_force_hot",
            *(f"parity_energy_hot_{i}" for i in models), *(f"parity_forces_hot_{i}" for i in models),
            "learning_curves_painn-small", "learning_curves_time_painn-small", "training_loss_painn-small",
        )
    ]  # fmt: skip


def test_pictures_stay_with_their_data_set(make_run, tmp_path):
    write_report([make_run("a", tests=("test", "test_600K"))], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    first, second = page.split("## Results on test_600K")
    assert "errors_energy_test.png" in first
    assert "errors_energy_test_600K.png" not in first
    assert "errors_energy_test_600K.png" in second


def test_data_sets_whose_names_make_one_file_name_have_two(make_run, tmp_path):
    report = write_report([make_run("a", tests=("a b", "a-b", "A-B"))], tmp_path / "out")
    assert len(set(map(str.lower, report.plots))) == len(report.plots)
    assert all((tmp_path / "out" / path).exists() for path in report.plots)


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
    curve = mean_curve(group_runs(map(read_run, runs[:3]))[0].runs, "val_force_mae_meV_A")
    np.testing.assert_array_equal(curve.steps, [100, 200, 300])
    np.testing.assert_array_equal(curve.seconds, [2, 4, 6])
    np.testing.assert_allclose(curve.mean, [160, 80, 40])
    np.testing.assert_allclose(curve.lowest, [156, 78, 39])
    np.testing.assert_allclose(curve.highest, [164, 82, 41])


def test_curves_of_unequal_length_end_where_all_seeds_still_run(runs):
    path = runs[1] / "metrics.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    curve = mean_curve([read_run(p) for p in runs[:3]], "val_force_mae_meV_A")
    assert curve.steps.tolist() == [100, 200]


@pytest.mark.parametrize(("against", "last"), [("step", 300), ("seconds", 6)])
def test_learning_curves_show_every_group_on_log_axes(runs, against, last):
    groups = group_runs(map(read_run, runs))
    axes = plot_curves(groups, styles(groups), VALIDATION, against=against).axes
    assert len(axes) == 2
    for ax in axes:
        assert ax.get_yscale() == "log"
        assert [line.get_color() for line in ax.lines] == list(COLORS[:2])
        assert [line.get_xdata()[-1] for line in ax.lines] == [last, last]


def test_kd_terms_have_a_panel_each(make_run):
    folder = make_run("kd", kd=[N2N, V2V])
    final = json.loads((folder / "metrics.json").read_text()) | {"kd": {"n2n": 3.0, "v2v": 1.0}}
    (folder / "metrics.json").write_text(json.dumps(final))
    (folder / "metrics.csv").write_text("step,seconds,train_n2n,train_v2v\n1,1,4,-1\n2,2,3,-2\n")
    groups = group_runs([read_run(folder)])
    columns = kd_columns(groups)
    n2n, v2v = plot_curves(groups, styles(groups), columns).axes
    assert (n2n.get_title("left"), v2v.get_title("left")) == ("n2n loss, unweighted", "v2v loss, unweighted")
    assert n2n.lines[0].get_ydata().tolist() == [4, 3]
    assert (n2n.get_yscale(), v2v.get_yscale()) == ("log", "linear")  # what is below zero has no logarithm


def test_what_no_run_measured_is_left_out(make_run, tmp_path):
    nan = {"energy": 50.0, "force": None}
    report = write_report(
        [make_run("no", **nan), make_run("kd", kd=[N2N], **nan)], tmp_path / "out", teacher=TEACHER
    )
    row = report.tables["test"][2]
    assert set(row.gaps) == {"energy_mae_meV"}
    assert "forces (%)" not in report.text()
    students = [r for r in report.tables["test"] if r.role != "teacher"]
    names = model_styles([r.name for r in students])
    assert plot_errors(students, "energy_mae_meV", names) is not None
    assert plot_errors(students, "force_mae_meV_A", names) is None


def test_without_validation_there_are_no_curves(runs):
    (runs[0] / "metrics.csv").unlink()
    groups = group_runs([read_run(runs[0])])
    assert plot_curves(groups, styles(groups), VALIDATION) is None


def test_error_chart_holds_all_points_names_and_the_teacher(runs):
    groups = group_runs(map(read_run, runs))
    rows = build_rows(groups, "test", TEACHER, {})
    for key, teacher, worst in (("energy_mae_meV", 20.0, 52.0), ("force_mae_meV_A", 10.0, 41.0)):
        (ax,) = plot_errors(rows, key, styles(groups)).axes
        low, high = ax.get_xlim()
        assert low == 0
        assert high > worst
        assert teacher in [line.get_xdata()[0] for line in ax.lines]
        texts = [text.get_text() for text in ax.texts]
        assert texts[0::2] == ["painn-small, without KD", "painn-small, n2n=auto"]
    assert texts[1::2] == ["40.0 ± 1.0", "32.5 ± 0.0"]


def test_speed_chart_holds_every_model_and_the_line_of_the_best(make_run, make_evaluation, tmp_path):
    folders = [make_run("no"), make_run("kd", kd=[N2N])]
    evaluations = {f: {"test": make_evaluation(e, e)} for f, e in zip(folders, (0.05, 0.03), strict=True)}
    teacher = TeacherResult("big", {"test": {"force_mae_meV_A": 10.0, "systems_per_second": 20.0}})
    groups = group_runs(map(read_run, folders))
    rows = build_rows(groups, "test", teacher, evaluations)
    (ax,) = plot_speed(rows, "force_mae_meV_A", styles(groups)).axes
    line = ax.lines[-1]  # the student without KD is as fast as that with KD, and worse
    np.testing.assert_allclose(line.get_xdata(), [100, 20])
    np.testing.assert_allclose(line.get_ydata(), [30, 10])
    assert plot_speed(rows[:1], "force_mae_meV_A", styles(groups)) is None


def test_pareto_line_by_hand():
    points = [(10, 5), (20, 5), (5, 1), (4, 2), (30, 9), (30, 8)]
    assert pareto(points) == [(30, 8), (20, 5), (5, 1)]


@pytest.mark.parametrize("quantity", ["energy", "forces"])
def test_parity_figures_share_axes_that_hold_every_point(make_evaluation, quantity):
    panels = [Panel("teacher", make_evaluation(0.01, 0.01)), Panel("student", make_evaluation(0.9, 0.5))]
    tops = [figure.axes[0] for figure in plot_parity(panels, quantity)]
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
    titles = [ax.get_title("right") for ax in tops]
    assert (
        titles
        == {
            "energy": ["MAE 0.500 meV/atom", "MAE 45.0 meV/atom"],
            "forces": ["MAE 10.0 meV/Å", "MAE 500 meV/Å"],
        }[quantity]
    )


def test_many_points_become_a_density_with_one_scale(make_evaluation, tmp_path):
    few, many = make_evaluation(n_systems=10), make_evaluation(n_systems=60)
    assert few.parity.forces_pred.size <= MAX_POINTS < many.parity.forces_pred.size
    assert len(plot_parity([Panel("a", few)], "forces")[0].axes) == 2
    figures = plot_parity([Panel("a", many), Panel("b", many)], "forces")
    assert [len(figure.axes) for figure in figures] == [3, 3]  # two, and the bar
    densities = [figure.axes[0].collections[0] for figure in figures]
    assert sum(density.get_array().sum() for density in densities) == 2 * many.parity.forces_pred.size
    assert densities[0].norm is densities[1].norm
    picture = save_picture(figures[0], tmp_path, "plots/density.png", "words")
    assert (tmp_path / picture.path).stat().st_size > MIN_PNG_BYTES
    assert len(picture.svg) < 150_000  # pixels, not thousands of hexagons


def test_parity_without_labels_is_an_empty_picture(make_evaluation):
    evaluation = make_evaluation(n_systems=0)
    assert len(plot_parity([Panel("a", evaluation)], "energy")[0].axes) == 2


def test_pictures_repeat_byte_for_byte_and_follow_the_page(runs):
    groups = group_runs(map(read_run, runs))
    first, second = (svg_of(plot_curves(groups, styles(groups), VALIDATION)) for _ in range(2))
    assert first == second
    assert "#000000" not in first  # ink that would vanish on a dark page
    assert "prefers-color-scheme:dark" in first


def luminance(color):
    """WCAG 2: relative luminance of an sRGB colour."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", ["#ffffff", "#12161c"])
@pytest.mark.parametrize("color", COLORS)
def test_colors_stand_out_on_light_and_dark_pages(color, paper):
    bright, dim = sorted((luminance(color), luminance(paper)), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) >= 3  # WCAG 2.2, 1.4.11, of graphical objects


def test_models_differ_in_more_than_colour():
    many = model_styles([str(i) for i in range(24)])
    assert len({(s.color, s.marker) for s in many.values()}) == 24
    assert len({s.marker for s in list(many.values())[:8]}) == 8
