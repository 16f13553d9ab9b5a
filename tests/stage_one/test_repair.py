"""`kd cache repair` puts back what was there, bit for bit, and touches nothing else."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from forked_commands import run
from stage_one_cases import files, make_store, structures, write_extxyz, write_teacher

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.overlay import create_overlay
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.repairing import repair_store
from molkd.pipeline.sharing.copying import copy_store

SIGNALS = ("energy", "forces", "node", "v2v", "edge")
ENCODINGS = ("node=int8", "v2v=pca:8", "edge=fp16")


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """A finished store of two shards with plain and fitted encodings; nobody changes it."""
    store = shutil.copytree(made / "train.kdcache", tmp_path_factory.mktemp("whole") / "s.kdcache")
    config = {"teacher": str(made / "teacher.safetensors"), "signals": SIGNALS, "encoding": ENCODINGS}
    cache_teacher(CacheConfig(store=store, **config))
    return store


@pytest.fixture
def broken(whole, tmp_path):
    """A store of its own for this test, to be broken."""
    return shutil.copytree(whole, tmp_path / "s.kdcache")


def flip(path, bit=77):
    raw = bytearray(path.read_bytes())
    bit %= 8 * len(raw)
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def data_files(store):
    return {name: raw for name, raw in files(store).items() if name.startswith(("data.zarr/", "plan.json"))}


def assert_whole(store, whole, kept=()):
    """All data are as they were, all records intact, and the files in `kept` were not even rewritten."""
    assert data_files(store) == data_files(whole)
    report = verify(store)
    assert report.ok
    assert report.notes == []
    for path, inode in kept:
        assert path.stat().st_ino == inode, path


def inodes(store, *but):
    return [(p, p.stat().st_ino) for p in store.rglob("*") if p.is_file() and p not in but]


VALUES = "data.zarr/teachers/teacher/{}/c/{}"
DAMAGES = [
    VALUES.format("node/values", "0/0"),
    VALUES.format("node/scale", "1"),
    VALUES.format("v2v/values", "1/0/0"),
    VALUES.format("edge/index", "0/0"),
    VALUES.format("edge/n_edges", "1"),
    VALUES.format("energy/values", "0"),
    "log/teachers/teacher/forces/000001.json",
    "log/teachers/teacher/edge/000000.json",
]


@pytest.mark.parametrize("how", ["flipped", "removed", "cut off"])
def test_the_teacher_writes_what_was_there(broken, whole, teacher_file, how):
    paths = [broken / name for name in DAMAGES]
    kept = inodes(broken, *paths)
    for path in paths:
        if how == "flipped":
            flip(path)
        elif how == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1])
    summary = repair_store(broken, teacher=str(teacher_file))
    assert summary.ok
    assert len(summary.mended) == 7  # shards, of five signals
    assert_whole(broken, whole, kept)
    again = repair_store(broken)
    assert again.ok
    assert again.mended == []


@pytest.mark.parametrize("what", ["shards", "everything"])
def test_a_copy_gives_back_any_file(broken, whole, tmp_path, what):
    """Of a copy that `kd cache copy` made, whose records are its own."""
    copy = tmp_path / "copy.kdcache"
    copy_store(whole, copy)
    (copy / "manifest.json").unlink()
    names = sorted(files(broken))
    if what == "shards":
        names = [name for name in names if "/c/" in name][::3]
    for k, name in enumerate(names):
        if what == "shards" or k % 2:  # some record is left to tell whose plan it was
            flip(broken / name)
    summary = repair_store(broken, copy=copy)
    assert summary.needed == []
    assert_whole(broken, whole)


def test_what_follows_from_the_rest_needs_no_source(broken, whole):
    """Metadata, places of systems and the manifest are computed."""
    names = ["manifest.json", "data.zarr/systems/row/c/0", "data.zarr/systems/slot/c/0"]
    names += [f"data.zarr/{name}/zarr.json" for name in ("atoms", "atoms/forces", "systems/id", "teachers")]
    names += [f"data.zarr/teachers/teacher/{s}/zarr.json" for s in ("v2v/bits", "node/scale", "edge/shift")]
    for name in names:
        flip(broken / name)
    summary = repair_store(broken)
    assert summary.needed == []
    assert_whole(broken, whole)


def test_a_teachers_description_comes_from_the_manifest(broken, whole):
    (broken / "data.zarr/teachers/teacher/zarr.json").unlink()
    assert repair_store(broken).ok
    assert_whole(broken, whole)


def test_a_file_that_several_signals_need_is_named_once(broken):
    (broken / "data.zarr/teachers/teacher/zarr.json").unlink()
    (broken / "manifest.json").unlink()
    (needed,) = repair_store(broken).needed
    assert needed.startswith("data.zarr/teachers/teacher/zarr.json: damaged or missing; give an intact copy")


@pytest.mark.parametrize("kind", ["file", "record", "record and manifest"])
def test_structures_come_from_the_data(broken, whole, made, kind):
    if kind == "file":
        flip(broken / "data.zarr/atoms/positions/c/1/0")
        flip(broken / "data.zarr/atoms/tags/c/1")
    else:
        (broken / "log/atoms/000001.json").unlink()
    if kind == "record and manifest":
        (broken / "manifest.json").unlink()
    summary = repair_store(broken, data=[made / "train.extxyz"])
    assert summary.needed == []
    assert_whole(broken, whole)


@pytest.mark.parametrize("has_reference", [True, False])
def test_data_with_other_labels_are_refused(broken, tmp_path, has_reference):
    """Whether records still say what the bytes were, or only the store's hash of all labels is left."""
    systems = structures(320)
    for atoms in systems:
        atoms.set_tags((atoms.get_tags() + 1) % 3)
    other = write_extxyz(tmp_path / "other.extxyz", systems)
    if has_reference:
        flip(broken / "data.zarr/atoms/positions/c/1/0")
    else:
        (broken / "log/atoms/000001.json").unlink()
        (broken / "manifest.json").unlink()
    before = files(broken)
    summary = repair_store(broken, data=[other])
    assert len(summary.needed) == 1
    assert "has other labels, tags or fixed atoms than the store had" in summary.needed[0]
    assert files(broken) == before
    half = write_extxyz(tmp_path / "half.extxyz", structures(320)[::2])
    (needed,) = repair_store(broken, data=[half]).needed
    assert re.search(r"\d+ of its \d+ systems are not in \S+half.extxyz", needed)


def test_structures_first_then_what_is_computed_from_them(broken, whole, made, teacher_file):
    flip(broken / "data.zarr/atoms/positions/c/1/0")
    flip(broken / VALUES.format("node/values", "1/0"))
    (needed_atoms, needed_node) = repair_store(broken, teacher=str(teacher_file)).needed
    assert "the data it was made of (--data)" in needed_atoms
    assert "its structures are broken, too" in needed_node
    assert repair_store(broken, teacher=str(teacher_file), data=[made / "train.extxyz"]).ok
    assert_whole(broken, whole)


def test_unfinished_shards_are_written_too(broken, whole, teacher_file):
    """As after an interrupted pass of the teacher."""
    (broken / "manifest.json").unlink()
    shutil.rmtree(broken / "log/teachers/teacher/v2v")
    shutil.rmtree(broken / "data.zarr/teachers/teacher/v2v/values/c")
    assert len(repair_store(broken).needed) == 2
    assert repair_store(broken, teacher=str(teacher_file)).ok
    assert_whole(broken, whole)


def test_without_a_source_it_says_what_each_shard_needs(broken):
    flip(broken / "data.zarr/atoms/positions/c/0/0")
    flip(broken / VALUES.format("node/values", "1/0"))
    flip(broken / VALUES.format("v2v/basis", "0/0"))
    before = files(broken)
    summary = repair_store(broken)
    assert not summary.ok
    basis, atoms, node = sorted(summary.needed)
    assert "basis" in basis
    assert "give an intact copy of the store (--from)" in basis
    assert "shard 0 of atoms: chunk 0 of shard 0 of atoms/positions is damaged" in atoms
    assert "--from), or the data it was made of (--data)" in atoms
    assert "shard 1 of teachers/teacher/node" in node
    assert "--from), or its teacher (--teacher)" in node
    assert files(broken) == before


def test_a_dry_run_names_it_all_and_writes_nothing(broken, whole, teacher_file):
    flip(broken / VALUES.format("node/values", "1/0"))
    (broken / "data.zarr/atoms/forces/c/0/0").unlink()
    before = files(broken)
    summary = repair_store(broken, copy=whole, dry_run=True)
    assert summary.mended == [
        f"shard 0 of atoms: from {whole}",
        f"shard 1 of teachers/teacher/node: from {whole}",
    ]
    assert "would mend shard 0 of atoms" in summary.text()
    assert len(repair_store(broken, teacher=str(teacher_file), dry_run=True).needed) == 1
    assert files(broken) == before


def test_only_a_true_copy_is_believed(broken, whole, made, tmp_path):
    flip(broken / VALUES.format("node/values", "1/0"))
    other = make_store(tmp_path / "other.kdcache", made / "train.extxyz", seed=1)
    with pytest.raises(CacheError, match=r"is no copy of .*: the same systems, packed differently"):
        repair_store(broken, copy=other)
    recoded = tmp_path / "recoded.kdcache"
    copy_store(whole, recoded, encoding=("node=pca:4",))
    (needed,) = repair_store(broken, copy=recoded).needed
    assert "has it in another encoding, or of another teacher" in needed
    twin = shutil.copytree(whole, tmp_path / "twin.kdcache")
    flip(twin / VALUES.format("node/values", "1/0"), 99)
    (needed,) = repair_store(broken, copy=twin).needed
    assert "twin.kdcache" in needed
    assert "damaged, its crc32c is not the recorded one" in needed
    flip(broken / VALUES.format("node/values", "1/0"))
    assert verify(broken).ok  # what was damaged stayed where it was


def test_another_teacher_is_refused(broken, tmp_path):
    flip(broken / VALUES.format("node/values", "1/0"))
    other = write_teacher(tmp_path / "teacher", seed=9)
    (needed,) = repair_store(broken, teacher=str(other)).needed
    assert re.search(r"its teacher teacher is another one \(weights_sha256 \w+\.\.\., given", needed)


def test_other_rounding_is_refused_until_it_is_accepted(broken, whole, teacher_file, caplog):
    """As on other hardware; here the store's own record is made to tell of other bytes."""
    from molkd.cache_schema import jsonfile

    record = broken / "log/teachers/teacher/forces/000001.json"
    document, _ = jsonfile.read_sealed(record, max_bytes=1 << 30, remedy="")
    document["arrays"]["values"] |= {"crc32c": "00000000"}
    record.write_bytes(jsonfile.seal(document))
    (broken / "manifest.json").unlink()
    flip(broken / VALUES.format("node/values", "1/0"))  # this one can be mended all the same
    before = files(broken)
    summary = repair_store(broken, teacher=str(teacher_file))
    assert summary.mended == [f"shard 1 of teachers/teacher/node: from {teacher_file}"]
    assert (
        summary.bytes_written
        == (broken / VALUES.format("node/values", "1/0")).stat().st_size
        + (broken / VALUES.format("node/scale", "1")).stat().st_size
    )
    (needed,) = summary.needed
    assert "gives other values here than were stored" in needed
    assert "--accept-other-values takes them; give an intact copy of the store (--from)" in needed
    assert "1 thing is still broken" in summary.text()
    changed = {name for name, raw in files(broken).items() if raw != before.get(name)}
    assert changed == {VALUES.format("node/values", "1/0")}
    summary = repair_store(broken, teacher=str(teacher_file), accept_other_values=True)
    assert summary.ok
    assert "differ from those stored before" in caplog.text
    assert_whole(broken, whole)


def test_a_link_out_of_the_store_is_moved_aside(broken, whole, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(broken / "data.zarr/atoms/positions/c", outside)
    (broken / "data.zarr/atoms/positions/c").symlink_to(outside)
    path = broken / "data.zarr/atoms/forces/c/0/0"
    path.unlink()
    path.mkdir()
    before = files(outside)
    assert repair_store(broken, copy=whole).ok
    assert files(outside) == before
    aside = list(broken.rglob(".damaged-*"))
    assert len(aside) == 2
    report = verify(broken)
    assert report.ok
    assert {note.kind for note in report.notes} <= {"orphan"}
    for one in aside:
        one.unlink() if one.is_symlink() else one.rmdir()
    assert_whole(broken, whole)


def test_signals_of_an_overlay(whole, made, teacher_file, tmp_path):
    """Its structures are read from the shared store, which stays as it is."""
    shared = shutil.copytree(made / "train.kdcache", tmp_path / "shared.kdcache")
    mine = create_overlay(shared, tmp_path / "mine.kdcache")
    cache_teacher(CacheConfig(store=mine, teacher=str(teacher_file), signals=("node",), encoding=("int8",)))
    before, of_shared = files(mine / "data.zarr"), files(shared)
    flip(mine / VALUES.format("node/scale", "0"))
    (mine / VALUES.format("node/values", "1/0")).unlink()
    assert repair_store(mine, teacher=str(teacher_file)).ok
    assert files(mine / "data.zarr") == before
    assert files(shared) == of_shared
    with Cache.open(mine, complete=True) as cache:
        assert np.isfinite(cache.read([0], (), "teacher", ("node",))["teacher/node"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["copy", "teacher"])
def test_killed_and_run_again(made, whole, teacher_file, tmp_path, source):
    """Before any change on disk: what is intact stays so, and the same command finishes the work."""

    def damaged(name):
        store = shutil.copytree(whole, tmp_path / name)
        for damage in DAMAGES:
            flip(store / damage)
        (store / "data.zarr/teachers/teacher/node/zarr.json").write_text("{}")
        if source == "teacher":
            shutil.copy(
                whole / "data.zarr/teachers/teacher/node/zarr.json", store / "data.zarr/teachers/teacher/node"
            )
        return store

    option = ["--from", whole] if source == "copy" else ["--teacher", teacher_file]
    first = damaged("first.kdcache")
    done = run(["cache", "repair", first, *option], tmp_path / "log", watched=first)
    assert done.wait() == 0, done.text
    n_changes = int((tmp_path / "log.count").read_text())
    assert n_changes > 20
    for point in np.linspace(1, n_changes, 6).astype(int).tolist():
        store = damaged(f"{point}.kdcache")
        killed = run(["cache", "repair", store, *option], tmp_path / "log", watched=store, kill_at=point)
        assert killed.wait() == -signal.SIGKILL, killed.text
        damaged_files = {*DAMAGES, "data.zarr/teachers/teacher/node", "manifest.json"}
        assert {p.path for p in verify(store).problems} <= damaged_files
        resumed = run(["cache", "repair", store, *option], tmp_path / "log")
        assert resumed.wait() == 0, resumed.text
        assert_whole(store, whole)


def test_the_command(broken, whole, tmp_path):
    log = tmp_path / "log"
    assert "nothing is broken or missing" in run(["cache", "repair", broken], log).out
    flip(broken / VALUES.format("node/values", "1/0"))
    asked = run(["cache", "repair", broken, "--json"], log)
    assert asked.wait() == 3
    assert json.loads(asked.out)["needed"][0].startswith("shard 1 of teachers/teacher/node: ")
    assert run(["cache", "repair", broken, "--dry-run"], log).wait() == 3
    assert run(["cache", "repair", broken, "--dry-run", "--from", whole], log).wait() == 0
    mended = run(["cache", "repair", broken, "--from", whole], log)
    assert mended.wait() == 0
    assert f"mended shard 1 of teachers/teacher/node: from {whole}" in mended.out
    assert_whole(broken, whole)
    assert run(["cache", "repair", tmp_path / "none.kdcache"], log).wait() == 1
