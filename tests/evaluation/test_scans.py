"""Lambda scans: which groups belong together, and that the picture shows their numbers."""

import json

import numpy as np
import pytest

from molkd.pipeline.evaluation.groups import group_runs
from molkd.pipeline.evaluation.lambda_scan import find_scans, plot_scan
from molkd.pipeline.evaluation.results import TeacherResult, build_rows
from molkd.pipeline.evaluation.runs import read_run
from molkd.pipeline.evaluation.style import drawing, model_styles


def n2n(weight):
    return {"name": "n2n", "weight": weight}


V2V = {"name": "v2v", "weight": 2.0}


def resolved(folder, **weights):
    final = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(final | {"kd": weights}))
    return folder


@pytest.fixture
def runs(make_run):
    return [
        make_run("none0", energy=50.0), make_run("none1", energy=52.0, seed=1),
        make_run("a0", kd=[n2n(0.1)], energy=49.0), make_run("a1", kd=[n2n(0.1)], energy=47.0, seed=1),
        make_run("b0", kd=[n2n(10.0)], energy=40.0),
        resolved(make_run("c0", kd=[n2n("auto")], energy=42.0), n2n=2.0),
    ]  # fmt: skip


def scans(folders):
    groups = group_runs(map(read_run, folders))
    baseline = next((g.name for g in groups if not g.has_kd), None)
    return find_scans(groups, {g.name: baseline for g in groups if g.has_kd}), groups


def test_weights_of_one_term_are_a_scan_and_auto_stands_where_it_came_to(runs):
    (scan,), _ = scans(runs)
    assert (scan.student, scan.term, scan.others) == ("painn-small", "n2n", "")
    assert scan.baseline == "painn-small, without KD"
    assert [(p.weight, p.is_auto) for p in scan.points] == [(0.1, False), (2.0, True), (10.0, False)]


def test_other_settings_losses_or_students_are_no_part_of_a_scan(make_run, runs):
    others = [
        make_run("x0", kd=[n2n(100.0)], lr=5e-4),
        make_run("x1", kd=[n2n(100.0) | {"head": "mlp"}]),
        make_run("x2", kd=[n2n(100.0), V2V]),
        make_run("x3", kd=[n2n(100.0)], student="schnet"),
        make_run("x4", kd=[n2n(100.0)], pseudo_labels=True),
    ]
    (scan,), _ = scans([*runs, *others])
    assert [p.weight for p in scan.points] == [0.1, 2.0, 10.0]


def test_two_weights_are_no_scan(runs):
    assert scans(runs[:5])[0] == []


def test_beside_another_term_whose_weight_is_fixed(make_run):
    folders = [make_run(f"r{w}", kd=[V2V, n2n(w)]) for w in (1.0, 2.0, 3.0)]
    (scan,), _ = scans(folders)
    assert (scan.term, scan.others, scan.baseline) == ("n2n", "v2v=2", None)


def test_picture_shows_means_baseline_and_teacher(runs):
    (scan,), groups = scans(runs)
    rows = build_rows(groups, "test", TeacherResult("big", {"test": {"energy_mae_meV": 20.0}}), {})
    with drawing():
        styles = model_styles([g.name for g in groups])
        (ax,) = plot_scan(scan, rows, "energy_mae_meV", styles).axes
    line = ax.lines[0]
    np.testing.assert_allclose(line.get_xdata(), [0.1, 2.0, 10.0])
    np.testing.assert_allclose(line.get_ydata(), [48.0, 42.0, 40.0])
    assert ax.get_xscale() == "log"
    horizontal = [drawn.get_ydata()[0] for drawn in ax.lines if list(drawn.get_xdata()) == [0, 1]]
    assert sorted(horizontal) == [20.0, 51.0]


def test_picture_without_baseline_teacher_and_auto_has_nothing_to_explain(make_run):
    folders = [make_run(f"r{w}", kd=[n2n(w)]) for w in (1.0, 2.0, 3.0)]
    (scan,), groups = scans(folders)
    with drawing():
        figure = plot_scan(
            scan,
            build_rows(groups, "test", None, {}),
            "energy_mae_meV",
            model_styles([g.name for g in groups]),
        )
    assert figure.legends == []
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [1.0, 2.0, 3.0])
