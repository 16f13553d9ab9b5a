"""What a study file may say, and what it is told where it is wrong."""

from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from molkd.pipeline.errors import ConfigError
from molkd.pipeline.study.reading import read_study


def test_paths_are_those_beside_the_file(tmp_path, write, content, monkeypatch):
    """Whatever folder the command runs in; names of teachers and URLs stay as they are."""
    given = {
        "store": "a.kdcache",
        "val": "/data/val.extxyz",
        "test": ["b/t.extxyz", "bundled:test.extxyz.xz"],
        "data": {"files": "c.extxyz", "drop_labels": ["d.extxyz"]},
        "teachers": {"big": {"model": "sevennet-0", "scale_file": "f.json"}},
    }
    path = write(content | given | {"test": {"t": "b/t.extxyz", "x": "bundled:test.extxyz.xz"}})
    monkeypatch.chdir("/")
    study = read_study(path)
    assert (study.out, study.store, study.val) == (
        tmp_path / "small",
        tmp_path / "a.kdcache",
        Path("/data/val.extxyz"),
    )
    bundled = Path(str(files("molkd.pipeline.demo") / "test.extxyz.xz"))
    assert study.test == {"t": tmp_path / "b" / "t.extxyz", "x": bundled}
    assert bundled.exists()
    assert study.data.files == (tmp_path / "c.extxyz",)
    assert study.data.drop_labels == (tmp_path / "d.extxyz",)
    teacher = study.teachers["big"]
    assert (teacher.model, teacher.scale_file) == ("sevennet-0", tmp_path / "f.json")
    mixed = read_study(write(content | {"settings": {"data": {"more": {"mix": [{"store": "m.kdcache"}]}}}}))
    assert mixed.settings["data"]["more"]["mix"][0]["store"] == tmp_path / "m.kdcache"
    listed = read_study(write(content | {"test": ["b/t.extxyz", "bundled:other.extxyz.xz"]}))
    assert set(listed.test) == {"t", "other"}
    assert read_study(path, out=Path("elsewhere")).out == Path("/elsewhere")
    assert read_study(write(content | {"store": "s3://a/b.kdcache"})).store == "s3://a/b.kdcache"


def test_short_forms(write, content):
    study = read_study(write(content), ["seeds=[4, 1]", "steps=7"])
    assert study.strategies["none"].kd == ()
    assert study.strategies["n2n"].kd == ("n2n",)
    assert (study.seeds, study.steps) == ((4, 1), 7)
    assert read_study(write(content)).seeds == (0, 1)
    many = {"none": "none", "pseudo": {"set": {"pseudo_labels": True}}, "null": None}
    assert all(not s.kd for s in read_study(write(content | {"strategies": many})).strategies.values())
    weights = {"weight": {0.5: {}, 10: {}}}  # numbers may be names
    assert list(read_study(write(content | {"settings": weights})).settings["weight"]) == ["0.5", "10"]
    unnamed = read_study(write(content | {"pairs": [{"teacher": "big", "student": "schnet-tiny"}]}))
    assert unnamed.pairs[0].name == "big-to-schnet-tiny"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seedz": 3}, r"study\.yaml: unknown setting seedz; did you mean seeds\?"),
        ({"strategies": {"n2n": {"kdd": []}}}, r"strategies\.n2n\.kdd; did you mean strategies\.n2n\.kd\?"),
        ({"pairs": [{"teacher": "big"}]}, r"pairs\.0\.student: Field required"),
        ({"pairs": []}, "pairs: .*at least 1"),
        ({"pairs": [{"teacher": "big", "student": "pain-tiny"}]}, r"pain-tiny: .*did you mean painn-tiny\?"),
        (
            {"pairs": [{"teacher": "big", "student": "painn-tiny"}] * 2},
            "big-to-painn-tiny stands there twice",
        ),
        (
            {"pairs": [{"teacher": "big", "student": "painn-tiny", "lambdas": {"n2m": 1}}]},
            r"lambdas\.n2m: .*did you mean n2n\?",
        ),
        ({"pairs": [{"teacher": "b__g", "student": "painn-tiny"}]}, r"pairs\.0\.teacher: .*pattern"),
        ({"teachers": {"big": {}}}, r"teachers\.big: give either model"),
        ({"teachers": {"bug": {"model": "m"}}}, r"teachers\.bug: .*did you mean big\?"),
        ({"seeds": [1, 1]}, "seeds: 1 stands there twice"),
        ({"seeds": 0}, "seeds: .*at least 1"),
        ({"settings": {"lr": {}}}, r"settings\.lr: no alternatives"),
        ({"settings": {"seed": {"a": {}}}}, r"settings\.seed: seed has another meaning"),
        ({"settings": {"lr": {"a": {}}}, "zip": [["lr", "lt"]]}, r"zip: lt: .*did you mean lr\?"),
        (
            {"settings": {"a": {"x": {}}, "b": {"x": {}, "y": {}}}, "zip": [["a", "b"]]},
            "zip: a, b have different numbers of alternatives",
        ),
        ({"store": "s3://a/b.kdcache", "data": {"files": "a"}}, "store: one on a server is only read"),
        ({"test": ["a/t.xyz", "b/t.xyz"]}, "test: two files of the same name"),
        ({"test": "a/t.xyz", "report": {"test": "b/t.xyz"}}, r"report\.test: t stands there twice"),
        ({"report": {"test": {"hot": "b/t.xyz"}}}, r"report\.test: .*tuple"),
        ({"set": {"seed": 3}}, "set: seed would not count; the study says it under `seeds`"),
        ({"settings": {"w": {"x": {"kd": ["n2n"]}}}}, r"settings\.w\.x: kd would not .* under `strategies`"),
        ({"strategies": {"a": {"set": {"test.t": "t.xyz"}}}}, r"strategies\.a\.set: test\.t would not count"),
        ({"val": "v.xyz", "set": {"val": "w.xyz"}}, "set: val would not count"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes(write, content, change, says):
    with pytest.raises(ConfigError, match=says):
        read_study(write(content | change))


def test_what_is_no_study(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read as YAML"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text(yaml.safe_dump([1]))
    with pytest.raises(ConfigError, match=r"list\.yaml: expected a mapping"):
        read_study(tmp_path / "list.yaml")
