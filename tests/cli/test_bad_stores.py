"""What is no store, a store cut off or changed, and places that cannot be written."""

import re

import pytest
from cli_arguments import train

from molkd.cache_schema.jsonfile import read_sealed, seal


@pytest.mark.parametrize("command", ["cache info", "cache verify", "train-student", "cache-teacher"])
def test_what_is_no_store(refused, everything, tmp_path, command):
    options = {
        "train-student": ("--student", "painn-tiny", "--out", tmp_path / "out"),
        "cache-teacher": ("--teacher", everything / "teacher.safetensors"),
    }.get(command, ())
    none = tmp_path / "none.kdcache"
    refused(*command.split(), none, *options, says=[str(none), "no such folder", "kd ingest"])
    (tmp_path / "folder").mkdir()
    says = [str(tmp_path / "folder"), "not a store", r"kd ingest|NAME\.kdcache"]
    refused(*command.split(), tmp_path / "folder", *options, says=says)
    data = everything / "train.extxyz"
    refused(*command.split(), data, *options, says=[str(data), *says[1:]])


def test_store_would_overwrite_something(refused, everything, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    for name in ("mine", "file"):
        says = [f"{name}: exists and is not a store", "choose another name"]
        refused("ingest", everything / "train.extxyz", tmp_path / name, says=says)


def shard_file(store, array):
    return next(p for p in (store / "data.zarr" / array / "c").rglob("*") if p.is_file())


@pytest.mark.parametrize("array", ["atoms/positions", "teachers/teacher/node/values"])
@pytest.mark.parametrize("damage", ["cut off", "missing", "one bit"])
def test_damaged_store(kd, refused, everything, store, tmp_path, array, damage):
    """Named by verify, never read by others, and repaired by the remedy it gives."""
    path = shard_file(store, array)
    good = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(good[: len(good) // 2])
    else:
        path.write_bytes(good[:100] + bytes([good[100] ^ 4]) + good[101:])
    checked = kd("cache", "verify", store)
    assert checked.code == 3
    assert re.search(rf"shard 0 of {array}", checked.out), checked.out
    assert str(path.relative_to(store)) in checked.out
    says = [re.escape(str(path)), "damaged|bytes|missing", "[;.] .*(again|restore|copy)"]
    refused(*train(store, tmp_path / "run", "--kd", "n2n=1"), says=says, code=3, new=["run"])
    if array.startswith("atoms"):
        refused("evaluate", everything / "run", store, says=says, code=3)
    record = re.search(r"delete (log/\S+\.json)", checked.out)
    assert record, checked.out
    (store / record[1]).unlink()
    signals = ("--signals", "energy,forces,atomic_energies,node,v2v")
    repair = {
        "atoms/positions": ("ingest", everything / "train.extxyz", store),
        "teachers/teacher/node/values": (
            "cache-teacher", store, "--teacher", everything / "teacher.safetensors", *signals,
        ),
    }[array]  # fmt: skip
    repaired = kd(*repair)
    assert repaired.code == 0, repaired.err
    assert path.read_bytes() == good
    assert kd("cache", "verify", store).code == 0


def test_missing_commit_record(kd, refused, everything, store, tmp_path):
    (store / "log" / "teachers" / "teacher" / "node" / "000000.json").unlink()
    checked = kd("cache", "verify", store)
    assert checked.code == 3
    assert "teachers/teacher/node/000000.json" in checked.out
    (store / "manifest.json").unlink()  # as after a crash in the middle: simply unfinished
    assert kd("cache", "verify", store).code == 0
    says = ["node of teacher is unfinished|node is not finished", "again"]
    refused(*train(store, tmp_path / "run", "--kd", "n2n=1"), says=says, new=["run"])
    teacher = everything / "teacher.safetensors"
    assert kd("cache-teacher", store, "--teacher", teacher, "--signals", "node").code == 0
    assert kd(*train(store, tmp_path / "run", "--kd", "n2n=1")).code == 0


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "log/atoms/000000.json"])
def test_damaged_description(kd, refused, store, name):
    """A changed digit in any of the small files is noticed by whoever opens the store."""
    path = store / name
    content = path.read_bytes()
    digit = re.search(rb'"(?:seed|bytes|n_atoms)": ?(\d)', content)
    assert digit
    place = digit.start(1)
    path.write_bytes(content[:place] + b"%d" % (9 - int(content[place : place + 1])) + content[place + 1 :])
    assert kd("cache", "verify", store).code == 3
    if not name.startswith("log"):  # with a manifest the log is not read
        refused("cache", "info", store, says=[re.escape(str(path)), "damaged|sha256|seal"], code=3)


def test_store_of_a_newer_format(refused, store):
    document, _ = read_sealed(store / "plan.json", max_bytes=1 << 20, remedy="")
    (store / "plan.json").write_bytes(seal({**document, "format": 99}))
    refused("cache", "info", store, says=["plan.json: format 99", "update molkd"])


def test_places_that_cannot_be_written(refused, everything, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "out"
    data, run = everything / "train.extxyz", everything / "run"
    refused("evaluate", run, data, "--predictions", place, says=[str(place)])
    refused("report", run, "--out", place, says=[str(place)])
    refused("ingest", data, place, says=[str(place)])
    refused(*train(everything / "train.kdcache", place), says=[str(place)])


def test_report_of_what_is_no_run(refused, tmp_path):
    says = ["none: no config.yaml inside; give the --out folder of `kd train-student`"]
    refused("report", tmp_path / "none", "--out", tmp_path / "report", says=says)
