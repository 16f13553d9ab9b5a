"""Which values are marked, and what the first lines say of the best students."""

import pytest

from molkd.pipeline.evaluation.best import best_marks, best_tiles
from molkd.pipeline.evaluation.document import Mark
from molkd.pipeline.evaluation.gap import GapClosed
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.results import Row
from molkd.pipeline.evaluation.seeds import SeedStat

NOTHING = SeedStat(None, None, 0)


def row(name, role="with KD", gaps=None, **metrics):
    stats = dict.fromkeys(REPORTED, NOTHING) | {k: SeedStat(*v) for k, v in metrics.items()}
    return Row(name, role, stats, {}, gaps or {}, NOTHING, NOTHING, None, 3)


def marked(rows, key, students=None):
    students = students or {r.name: "s" for r in rows if r.role != "teacher"}
    return [marks.get(key, Mark.NONE) for marks in best_marks(rows, students)]


def test_the_best_and_what_lies_within_its_spread():
    rows = [
        row("teacher", "teacher", energy_mae_meV=(1.0, None, 1)),
        row("a", energy_mae_meV=(10.0, 2.0, 3)),
        row("b", energy_mae_meV=(12.0, 0.1, 3)),
        row("c", energy_mae_meV=(12.1, 9.0, 3)),  # its own large spread brings it no nearer
        row("d", energy_mae_meV=(float("nan"), None, 3)),
        row("e"),
    ]
    assert marked(rows, "energy_mae_meV") == [
        Mark.NONE, Mark.BEST, Mark.NEAR, Mark.NONE, Mark.NONE, Mark.NONE,
    ]  # fmt: skip


def test_scores_are_best_where_they_are_largest():
    rows = [
        row("a", force_cos=(0.9, 0.01, 3)),
        row("b", force_cos=(0.895, 0.0, 3)),
        row("c", force_cos=(0.8, 0.2, 3)),
    ]
    assert marked(rows, "force_cos") == [Mark.BEST, Mark.NEAR, Mark.NONE]


def test_one_seed_has_no_spread_so_nothing_is_near():
    rows = [row("a", energy_mae_meV=(10.0, None, 1)), row("b", energy_mae_meV=(10.01, 5.0, 3))]
    assert marked(rows, "energy_mae_meV") == [Mark.BEST, Mark.NONE]


def test_equal_columns_are_not_marked_and_two_equal_best_both_are():
    equal = [row("a", efwt_percent=(0.0, 0.0, 3)), row("b", efwt_percent=(0.0, 0.0, 3))]
    assert marked(equal, "efwt_percent") == [Mark.NONE, Mark.NONE]
    two = [*equal, row("c", efwt_percent=(-1.0, 0.0, 3))]
    assert marked(two, "efwt_percent") == [Mark.BEST, Mark.BEST, Mark.NONE]


def test_students_are_marked_apart():
    rows = [
        row(n, energy_mae_meV=(v, 0.1, 3)) for n, v in (("a1", 5.0), ("a2", 6.0), ("b1", 8.0), ("b2", 7.0))
    ]
    students = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}
    assert marked(rows, "energy_mae_meV", students) == [Mark.BEST, Mark.NONE, Mark.NONE, Mark.BEST]


def test_first_lines_name_the_best_its_seeds_and_its_share_of_the_gap():
    gaps = {"energy_mae_meV": GapClosed(61.25, 4.0), "force_mae_meV_A": GapClosed(None, None, "no gap")}
    rows = [
        row("teacher: T", "teacher", energy_mae_meV=(20.0, None, 1)),
        row("s", "without KD", energy_mae_meV=(50.0, 2.0, 3), force_mae_meV_A=(40.0, 1.0, 3)),
        row("s, n2n", gaps=gaps, energy_mae_meV=(31.6, 1.0, 3), force_mae_meV_A=(39.0, 1.0, 3)),
    ]
    energy, force = best_tiles({"test": rows}, {"s, n2n": "s"})
    assert (energy.label, energy.value) == ("Best energy MAE, test", "31.6 ± 1.0 meV")
    assert energy.note == (
        "s, n2n, 3 seeds; 61.2 ± 4.0 % of the gap closed; teacher 20.0; without KD 50.0 ± 2.0"
    )
    assert (force.label, force.value) == ("Best force MAE, test", "39.0 ± 1.0 meV/Å")
    assert "gap closed: no gap" in force.note


def test_the_student_without_kd_can_be_the_best():
    rows = [
        row("s", "without KD", energy_mae_meV=(30.0, 2.0, 3)),
        row("s, n2n", energy_mae_meV=(31.0, 1.0, 3)),
    ]
    (tile,) = best_tiles({"test": rows}, {"s, n2n": "s"})
    assert tile.note == "s, 3 seeds"


@pytest.mark.parametrize("mark", [Mark.BEST, Mark.NEAR])
def test_marks_have_words_for_who_does_not_see_them(mark):
    assert "best" in mark.words
