"""What student, teacher or store cannot give is found before any run."""

import pytest

from molkd.cache_schema.reader import Cache
from molkd.pipeline.errors import CacheError, ConfigError
from molkd.pipeline.study.fitting import split_fitting
from molkd.pipeline.study.grid import cells_of, runs_of

TWO = [
    {"teacher": "big", "student": "painn-tiny", "name": "p"},
    {"teacher": "big", "student": "schnet-tiny", "name": "s"},
]


def split(study, material):
    runs = runs_of(study, cells_of(study), periodic=True)
    able, skipped = split_fitting(runs, Cache.open(material / "s.kdcache"))
    return {run.name.rpartition("/")[0] for run in able}, skipped


def test_a_student_without_vectors_goes_without_v2v(study, material):
    able, skipped = split(study(pairs=TWO, strategies={"none": [], "v2v": "v2v"}, set={}), material)
    assert able == {"p/none", "p/v2v", "s/none"}
    assert set(skipped) == {"s/v2v"}
    assert "this student has none" in skipped["s/v2v"]


def test_a_teacher_without_vectors_does(study, material):
    pairs = [TWO[0], {"teacher": "flat", "student": "painn-tiny", "name": "f"}]
    able, skipped = split(study(pairs=pairs, strategies={"n2n": "n2n", "v2v": "v2v"}), material)
    assert able == {"p/n2n", "p/v2v", "f/n2n"}
    assert skipped["f/v2v"].startswith("teacher flat gives no v2v; it gives ")


def test_heads_that_do_not_fit_are_left_out(study, material):
    """The teacher has 8 channels, as the student of one setting has."""
    settings = {"width": {"8": {}, "12": {"model.hidden_channels": 12}}}
    identity = {"linear": "n2n", "identity": "n2n,head=identity"}
    able, skipped = split(study(strategies=identity, settings=settings), material)
    assert able == {"p/linear__8", "p/linear__12", "p/identity__8"}
    assert "student 12, teacher 8" in skipped["p/identity__12"]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"strategies": {"e2e": "e2e"}}, CacheError, r"lacks edge of teacher big; .*--signals edge"),
        (
            {"pairs": [{"teacher": "bug", "student": "painn-tiny"}], "teachers": {}},
            CacheError,
            r"no teacher bug in this store; name it as the store does \(big, flat\)",
        ),
        (
            {"strategies": {"none": [], "far": "n2n:U9"}},
            ConfigError,
            r"strategies\.far: fits no pair: .*no scalar features U9",
        ),
        ({"set": {"model.hiden_channels": 8}}, ConfigError, "hidden_channels"),
    ],
)
def test_what_is_a_mistake(study, material, change, error, says):
    with pytest.raises(error, match=says):
        split(study(**change), material)
