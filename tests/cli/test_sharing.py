"""Stores copied, chosen from, merged, extended, overlaid, exported, described and listed by commands."""

import errno
import json
import os
import re
import shutil

import ase.io
import numpy as np
import pytest
import xarray
import zarr
from stage_one_cases import files, structures, write_extxyz, write_teacher

from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify

SIGNALS = ("energy", "forces", "atomic_energies", "node", "v2v")


@pytest.fixture(scope="module")
def source(everything):
    """A store with the signals of teacher.safetensors; nobody changes it."""
    return everything / "train.kdcache"


def by_id(store, teacher="teacher", signals=SIGNALS):
    with Cache.open(store, complete=True) as cache:
        return {
            row.tobytes(): cache.read([i], ("positions", "forces", "energy"), teacher, signals)
            for i, row in enumerate(cache.ids)
        }


def as_json(result):
    assert result.code == 0, result.err
    return json.loads(result.out)


# -------------------------------------------------------------------------------------------- copy and select


def test_copy_of_a_selection(kd, source, tmp_path):
    chosen = as_json(kd("cache", "select", source, tmp_path / "ch2o.txt", "--formula", "CH2O", "--json"))
    assert chosen["n_systems"] == 15  # every fourth of 60
    lines = (tmp_path / "ch2o.txt").read_text().splitlines()
    assert len([line for line in lines if re.fullmatch("[0-9a-f]{32}", line)]) == 15
    command = ("cache", "copy", source, tmp_path / "b.kdcache", "--systems", tmp_path / "ch2o.txt")
    summary = as_json(kd(*command, "--signals", "node,energy", "--json"))
    assert (summary["n_systems"], set(summary["signals"])) == (15, {"teacher/node", "teacher/energy"})
    theirs = by_id(source)
    for key, arrays in by_id(tmp_path / "b.kdcache", signals=("node", "energy")).items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, theirs[key][name])
    assert kd("cache", "verify", tmp_path / "b.kdcache").code == 0


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["--elements", "H,O"], 15),
        (["--contains", "C,H"], 45),
        (["--contains", "C", "--elements", "C,O"], 0),
        (["--formula", "C*O"], 45),
        (["--min-atoms", "4", "--max-atoms", "8"], 30),
        (["--periodic"], 15),
        (["--not-periodic", "--max-atoms", "3"], 15),
        (["--source", "*train.extxyz"], 60),
        (["--with-energy"], 60),
        (["--random", "7"], 7),
        (["--random", "100"], 60),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_conditions(kd, source, tmp_path, conditions, expected):
    """Of 60 systems a quarter each are ethanol, water, methanol, and cells of C, O and two H."""
    result = kd("cache", "select", source, tmp_path / "ids.txt", *conditions, "--json")
    if not expected:
        assert result.code == 1
        assert "no system fits (elements C O, contains C)" in result.err
        assert not (tmp_path / "ids.txt").exists()
        return
    assert as_json(result)["n_systems"] == expected


def test_adsorbates_go_by_their_tags(kd, source, tmp_path):
    with Cache.open(source) as cache:
        read = [cache.read([i], ("atomic_numbers", "tags")) for i in range(cache.n_systems)]
    expected = sum((arrays["atomic_numbers"][arrays["tags"] == 2]).tolist() == [8] for arrays in read)
    assert expected
    chosen = kd("cache", "select", source, tmp_path / "o.txt", "--adsorbate", "O", "--json")
    assert as_json(chosen)["n_systems"] == expected


def test_random_choice_depends_on_the_seed_only(kd, source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        kd("cache", "select", source, tmp_path / name, "--random", 20, "--seed", seed)
    a, b, c = ((tmp_path / name).read_text().splitlines()[2:] for name in "abc")
    assert a == b
    assert set(a) != set(c)
    # The same systems whatever else is in the store: a sample of a sample is made of the same order.
    kd("cache", "select", source, tmp_path / "d", "--systems", tmp_path / "a", "--random", 5, "--seed", 1)
    kd("cache", "select", source, tmp_path / "e", "--random", 5, "--seed", 1)
    assert (tmp_path / "d").read_text().splitlines()[2:] == (tmp_path / "e").read_text().splitlines()[2:]


def test_select_keeps_files_of_another_kind(refused, source, tmp_path):
    precious = write_extxyz(tmp_path / "train.extxyz", structures(2))
    refused("cache", "select", source, precious, says=["exists and is no list of ids"])


def test_ids_that_a_store_does_not_have(kd, refused, everything, source, tmp_path):
    kd("cache", "select", everything / "bare.kdcache", tmp_path / "bare.txt")
    refused(
        "cache", "copy", source, tmp_path / "b.kdcache", "--systems", tmp_path / "bare.txt",
        says=["8 of 10 ids are not in"],
    )  # fmt: skip
    (tmp_path / "bad.txt").write_text("# ids\n\n0123\n")
    refused(
        "cache", "select", source, tmp_path / "x", "--systems", tmp_path / "bad.txt", says=["line 3: '0123'"]
    )
    refused("cache", "select", source, tmp_path / "x", "--contains", "Xx", says=["no element Xx"])


def test_copy_in_another_encoding_trains(kd, source, tmp_path):
    from cli_arguments import train

    store = tmp_path / "b.kdcache"
    assert kd("cache", "copy", source, store, "--encoding", "int8", "--encoding", "v2v=fp16").code == 0
    with Cache.open(store, complete=True) as cache:
        encodings = {s: e.encoding for s, e in cache.teachers["teacher"].signals.items()}
    assert encodings == {
        "energy": "fp64", "forces": "fp32", "atomic_energies": "fp64", "node": "int8", "v2v": "fp16"
    }  # fmt: skip
    done = kd(*train(store, tmp_path / "run", "--kd", "n2n=auto", "--kd", "v2v=auto"))
    assert done.code == 0, done.err


def test_copy_to_a_url_takes_a_whole_store(kd, source):
    result = kd("cache", "copy", source, "s3://bucket/a.kdcache", "--signals", "node")
    assert result.code == 2
    assert "to a URL goes a whole store" in result.err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("cache", "select", "SOURCE", "URL", "--elements", "C,H,O"), "give a local path"),
        (("cache", "card", "SOURCE", "--out", "URL"), "give a local path"),
        (("cache", "export", "SOURCE", "URL", "--format", "npz"), "give a local path"),
        (("evaluate", "any", "SOURCE", "--predictions", "URL"), "give a local path"),
        (("train-student", "SOURCE", "--out", "URL"), "give a local path"),
        (("cache", "overlay", "SOURCE", "URL"), "copy it to a local folder first"),
        (("cache", "add", "SOURCE", "more.extxyz", "URL"), "copy it to a local folder first"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_an_output_on_a_server_is_refused(refused, source, tmp_path, monkeypatch, command, says):
    """As a path it would be a local folder named s3: instead."""
    monkeypatch.chdir(tmp_path)
    places = {"SOURCE": source, "URL": "s3://bucket/of/somebody"}
    refused(*(places.get(word, word) for word in command), says=("s3://bucket/of/somebody", says))


# ---------------------------------------------------------------------------------- merge, add, overlay


def test_merge(kd, source, tmp_path):
    small, large = tmp_path / "small.kdcache", tmp_path / "large.kdcache"
    kd("cache", "copy", source, small, "--max-atoms", 4)
    kd("cache", "copy", source, large, "--min-atoms", 4)
    summary = as_json(kd("cache", "merge", small, large, tmp_path / "m.kdcache", "--json"))
    assert (summary["n_systems"], summary["left_out"]) == (60, [])
    theirs = by_id(source)
    ours = by_id(tmp_path / "m.kdcache")
    assert ours.keys() == theirs.keys()
    for key, arrays in ours.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, theirs[key][name])


def test_add_runs_the_teacher_over_what_is_new(kd, everything, tmp_path):
    teacher = everything / "teacher.safetensors"
    store = tmp_path / "a.kdcache"
    data = structures(40, seed=8)
    write_extxyz(tmp_path / "old.extxyz", data[:30])
    write_extxyz(tmp_path / "new.extxyz", data[25:])
    options = ("--signals", "energy,node,v2v", "--encoding", "int8")
    kd("ingest", tmp_path / "old.extxyz", store, "--shard-atoms", 1024)
    assert kd("cache-teacher", store, "--teacher", teacher, *options).code == 0
    command = ("cache", "add", store, tmp_path / "new.extxyz", tmp_path / "b.kdcache", "--teacher", teacher)
    summary = as_json(kd(*command, "--json"))
    assert (summary["n_systems"], summary["n_new"], summary["left_out"]) == (40, 10, [])
    assert verify(tmp_path / "b.kdcache").ok
    signals = ("energy", "node", "v2v")
    ours, theirs = by_id(tmp_path / "b.kdcache", signals=signals), by_id(store, signals=signals)
    for key, arrays in theirs.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(ours[key][name], values)  # neither computed nor encoded again
    # The new systems as the teacher gives them, up to the rounding of int8.
    write_extxyz(tmp_path / "all.extxyz", data)
    kd("cache-teacher", tmp_path / "all.extxyz", tmp_path / "c.kdcache", "--teacher", teacher,
       "--signals", ",".join(signals), "--encoding", "fp32")  # fmt: skip
    for key, arrays in by_id(tmp_path / "c.kdcache", signals=signals).items():
        np.testing.assert_allclose(ours[key]["teacher/energy"], arrays["teacher/energy"], rtol=1e-5)
        for name in ("teacher/node", "teacher/v2v"):
            scale = np.abs(arrays[name]).max()
            np.testing.assert_allclose(ours[key][name], arrays[name], atol=0.1 * scale)
    with Cache.open(tmp_path / "b.kdcache") as cache, Cache.open(store) as before:
        ours, theirs = (c.signal("teacher", "node").codebook for c in (cache, before))
        np.testing.assert_array_equal(ours.step, theirs.step)
    assert not (tmp_path / "b.adding.kdcache").exists()
    again = as_json(kd(*command[:-1], tmp_path / "deleted.safetensors", "--json"))  # nothing left to compute
    assert (again["n_systems"], again["bytes_written"]) == (40, 0)
    assert not (tmp_path / "b.adding.kdcache").exists()


def test_add_needs_the_teacher(kd, refused, everything, source, tmp_path):
    data = write_extxyz(tmp_path / "new.extxyz", structures(3, seed=8))
    command = ("cache", "add", source, data, tmp_path / "b.kdcache")
    refused(*command, says=["holds signals of teacher", "--teacher"])
    refused(
        *command, "--teacher", write_teacher(tmp_path / "other", seed=4),
        says=["its teacher teacher is another one"], new=["b.adding.kdcache"],
    )  # fmt: skip


def test_add_without_signals(kd, everything, tmp_path):
    data = write_extxyz(tmp_path / "new.extxyz", structures(3, seed=8))
    command = ("cache", "add", everything / "bare.kdcache", data, tmp_path / "b.kdcache", "--json")
    assert as_json(kd(*command))["n_systems"] == 13


def test_overlay_with_another_teacher(kd, everything, source, tmp_path):
    before = files(source)
    mine = tmp_path / "mine.kdcache"
    assert kd("cache", "overlay", source, mine).code == 0
    teacher = ("--teacher", everything / "schnet.safetensors", "--signals", "energy,node", "--name", "schnet")
    done = kd("cache-teacher", mine, *teacher)
    assert done.code == 0, done.err
    assert files(source) == before
    info = kd("cache", "info", mine)
    assert f"an overlay: structures, labels and other signals lie in {source}" in info.out
    with Cache.open(mine, complete=True) as cache:
        assert {name: sorted(entry.signals) for name, entry in cache.teachers.items()} == {
            "teacher": sorted(SIGNALS), "schnet": ["energy", "node"],
        }  # fmt: skip
    again = as_json(kd("cache-teacher", mine, *teacher, "--json"))
    assert again["n_computed"] == 0
    # The signals of the shared store need not be computed either.
    kept = as_json(kd("cache-teacher", mine, "--teacher", everything / "teacher.safetensors", "--json"))
    assert (kept["n_computed"], files(source)) == (0, before)
    assert kd("cache", "copy", mine, tmp_path / "full.kdcache").code == 0
    assert kd("cache", "verify", tmp_path / "full.kdcache").code == 0


# ----------------------------------------------------------------------------------------------- export


def test_npz(kd, source, tmp_path):
    summary = as_json(kd("cache", "export", source, tmp_path / "a.npz", "--json"))
    assert summary["format"] == "npz"
    with np.load(tmp_path / "a.npz") as arrays, Cache.open(source) as cache:
        everything = np.arange(cache.n_systems)
        theirs = cache.read(everything, ("positions", "forces", "energy", "cell"), "teacher", SIGNALS)
        for name in ("positions", "forces", "energy", "cell"):
            np.testing.assert_array_equal(arrays[name], theirs[name])
        for name in SIGNALS:
            np.testing.assert_array_equal(arrays[f"teacher/{name}"], theirs[f"teacher/{name}"])
            assert arrays[f"teacher/{name}"].dtype == theirs[f"teacher/{name}"].dtype
        assert arrays["atom_ptr"][-1] == cache.n_atoms
        about = json.loads(arrays["about"].item())
        assert about["fingerprint"] == cache.fingerprint
        assert about["teachers"]["teacher"]["weights_sha256"]


def test_extxyz_comes_back_as_the_same_store(kd, source, tmp_path):
    result = kd("cache", "export", source, tmp_path / "a.extxyz", "--json")
    assert as_json(result)["signals"] == ["teacher/atomic_energies", "teacher/energy", "teacher/forces"]
    kd("ingest", tmp_path / "a.extxyz", tmp_path / "b.kdcache")
    with Cache.open(tmp_path / "b.kdcache") as ours, Cache.open(source) as theirs:
        assert ours.fingerprint == theirs.fingerprint  # to the last bit of every position
        assert ours.dataset["labels_sha256"] == theirs.dataset["labels_sha256"]
    frames = ase.io.read(tmp_path / "a.extxyz", ":")
    with Cache.open(source) as cache:
        own = cache.read([5], (), "teacher", ("energy", "forces"))
        assert frames[5].info["teacher_energy"] == pytest.approx(own["teacher/energy"][0])
        np.testing.assert_allclose(frames[5].arrays["teacher_forces"], own["teacher/forces"], rtol=1e-6)


def test_archive_is_read_with_zarr_alone(kd, source, tmp_path):
    kd("cache", "copy", source, tmp_path / "i.kdcache", "--signals", "node,energy", "--encoding", "int8")
    for name, options in (("a.zarr", ["--archive"]), ("a.zip", []), ("b.zarr", ["--compressor", "zstd:3"])):
        done = kd("cache", "export", tmp_path / "i.kdcache", tmp_path / name, *options)
        assert done.code == 0, done.err
    with Cache.open(tmp_path / "i.kdcache") as cache:
        theirs = cache.read(np.arange(cache.n_systems), ("positions",), "teacher", ("node", "energy"))
    for store in (tmp_path / "a.zarr", zarr.storage.ZipStore(tmp_path / "a.zip"), tmp_path / "b.zarr"):
        group = zarr.open_group(store, mode="r")
        node = group["teachers/teacher/node"]
        assert node.attrs["molkd"]["formula"] == "value = mean + scale * step * values"
        part = {name: node[name][...].astype(np.float32) for name in ("values", "scale", "step", "mean")}
        decoded = part["mean"] + part["scale"][:, None] * part["step"] * part["values"]
        np.testing.assert_allclose(decoded, theirs["teacher/node"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(group["teachers/teacher/energy/values"][...], theirs["teacher/energy"])
        np.testing.assert_array_equal(group["atoms/positions"][...], theirs["positions"])
        (codec,) = node["values"].compressors
        assert type(codec).__name__ == ("ZstdCodec" if store == tmp_path / "b.zarr" else "BloscCodec")


def test_archive_is_opened_by_xarray(kd, source, tmp_path):
    """Axes of one name have one length in each group, whatever the encoding."""
    encodings = ("--encoding", "node=pca:3", "--encoding", "v2v=int8")
    kd("cache", "copy", source, tmp_path / "i.kdcache", "--signals", "node,v2v", *encodings)
    kd("cache", "export", tmp_path / "i.kdcache", tmp_path / "a.zarr", "--archive")
    with Cache.open(tmp_path / "i.kdcache") as cache:
        vectors = cache.read(np.arange(cache.n_systems), (), "teacher", ("v2v",))["teacher/v2v"]
    opened = {
        name: xarray.open_zarr(tmp_path / "a.zarr", group=name, consolidated=False, chunks=None)
        for name in ("systems", "atoms", "teachers/teacher/node", "teachers/teacher/v2v")
    }
    assert opened["systems"].sizes["bound"] == opened["systems"].sizes["system"] + 1
    assert opened["teachers/teacher/node"].sizes["byte"] <= 3
    v2v = opened["teachers/teacher/v2v"]
    decoded = v2v.scale.astype("float32") * v2v.step * v2v["values"]
    np.testing.assert_allclose(decoded.transpose("atom", "xyz", "channel"), vectors, rtol=1e-5, atol=1e-6)


def test_export_of_a_part(kd, source, tmp_path):
    kd(
        "cache",
        "export",
        source,
        tmp_path / "a.npz",
        "--signals",
        "node",
        "--contains",
        "C",
        "--not-periodic",
    )
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["energy"]) == 30
        assert [name for name in arrays if name.startswith("teacher/")] == ["teacher/node"]


def test_exports_that_cannot_be(refused, source, tmp_path):
    (tmp_path / "there.npz").write_text("precious")
    refused("cache", "export", source, tmp_path / "there.npz", says=["exists; remove it"])
    refused("cache", "export", source, tmp_path / "a.hdf5", says=["--format"])
    refused(
        "cache",
        "export",
        source,
        tmp_path / "a.zarr",
        "--compressor",
        "lzma",
        says=["--compressor lzma: choose"],
    )
    refused("cache", "export", source, tmp_path / "a.npz", "--compressor", "none", says=["npz takes no"])


def test_an_archive_of_no_archive(kd, source, tmp_path):
    result = kd("cache", "export", source, tmp_path / "a", "--format", "npz", "--archive")
    assert result.code == 2
    assert "--archive makes zarr, zip or tar, not npz" in result.err


@pytest.mark.parametrize("option", ["--elements", "--contains", "--formula", "--adsorbate", "--signals"])
@pytest.mark.parametrize("value", ["", " , "])
def test_a_variable_that_is_not_set_does_not_ask_for_everything(kd, source, tmp_path, option, value):
    result = kd("cache", "copy", source, tmp_path / "part.kdcache", option, value)
    assert result.code == 2
    assert "is empty; say what is meant, or leave the option out" in result.err
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written_are_named(refused, source, tmp_path):
    (tmp_path / "file").write_text("precious")
    select = ("cache", "select", source, tmp_path / "file" / "ids.txt", "--elements", "C,H,O")
    refused(*select, says=[r"file/ids.txt: cannot be written \(", "check the path"])
    card = ("cache", "card", source, "--out")
    refused(*card, tmp_path / "file" / "card.md", says=[r"file/card.md: cannot be written \("])
    refused(*card, tmp_path / "file", says=["file: exists; remove it, or choose another name"])


# ------------------------------------------------------------------------------------------------ card, ls


def test_card_says_what_a_colleague_must_know(kd, everything, source, tmp_path):
    kd(
        "ingest",
        everything / "train.extxyz",
        tmp_path / "a.kdcache",
        "--licence",
        "CC-BY-4.0",
        "--citation",
        "Us 2026",
    )
    kd(
        "cache-teacher",
        tmp_path / "a.kdcache",
        "--teacher",
        everything / "teacher.safetensors",
        "--encoding",
        "int8",
    )
    text = kd("cache", "card", tmp_path / "a.kdcache").out
    with Cache.open(tmp_path / "a.kdcache") as cache:
        entry = cache.teachers["teacher"].signals["node"]
        weights = cache.teachers["teacher"].provenance["weights_sha256"]
        for fact in (
            cache.fingerprint, weights, "licence of the data: CC-BY-4.0", "citation of the data: Us 2026",
            "60 systems", "C (", "energy labels: 60", "train.extxyz", f"{entry.error_rms:.3g}"[:5],
            "kd train-student", "--kd n2n=auto",
        ):  # fmt: skip
            assert fact in text, fact
    (row,) = [line for line in text.splitlines() if line.startswith("| node |")]
    assert "int8" in row
    kd("cache", "card", tmp_path / "a.kdcache", "--out", tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text() == text
    assert "not stated" in kd("cache", "card", source).out


def test_ls_tells_what_it_may_not_read(kd, source, tmp_path, monkeypatch, caplog):
    """Root may read anything, so the system is made to refuse."""
    root = tmp_path / "root"
    shutil.copytree(source, root / "good.kdcache")
    (root / "secret").mkdir()
    scandir = os.scandir

    def scan(path):
        if str(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    closed = [str(root / "secret")]
    monkeypatch.setattr(os, "scandir", scan)
    listed = kd("cache", "ls", root)
    assert listed.code == 0
    assert "good.kdcache" in listed.out
    assert f"{root / 'secret'}: cannot be looked into (Permission denied)" in caplog.text
    closed = [str(root)]
    result = kd("cache", "ls", root)
    assert result.code == 1
    assert result.err == f"error: {root}: cannot be looked into (Permission denied); ask its owner\n"


def test_ls_tells_health(kd, source, everything, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(source, root / "sub" / "good.kdcache")
    shutil.copytree(everything / "bare.kdcache", root / "bare.kdcache")
    bad = shutil.copytree(source, root / "bad.kdcache")
    (bad / "data.zarr" / "atoms" / "tags" / "c" / "0").unlink()
    part = shutil.copytree(source, root / "part.kdcache")
    (part / "manifest.json").unlink()
    next((part / "log" / "teachers" / "teacher" / "node").iterdir()).unlink()
    broken = shutil.copytree(source, root / "broken.kdcache")
    (broken / "plan.json").write_text("{}")
    (root / "no-store").mkdir()
    listed = {
        one["store"].split("/")[-1]: one for one in as_json(kd("cache", "ls", root, "--json"))["stores"]
    }
    assert set(listed) == {"good.kdcache", "bare.kdcache", "bad.kdcache", "part.kdcache", "broken.kdcache"}
    assert listed["good.kdcache"]["health"] == "ok"
    assert listed["good.kdcache"]["teachers"] == {"teacher": dict(zip(
        sorted(SIGNALS), ("fp64", "fp64", "fp32", "fp16", "fp16"), strict=True))}  # fmt: skip
    assert "atoms/tags is missing" in listed["bad.kdcache"]["health"]
    assert listed["part.kdcache"]["health"].startswith("unfinished")
    assert listed["broken.kdcache"]["health"].startswith("damaged")
    text = kd("cache", "ls", root).out
    assert len(text.splitlines()) == 7
    assert kd("cache", "ls", tmp_path / "root" / "no-store").out.startswith("no stores below")
