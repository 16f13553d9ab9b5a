"""Extended xyz, plain and compressed, against ase.io and hand-written frames."""

import bz2
import gzip
import lzma
import tempfile
from concurrent.futures import ThreadPoolExecutor

import ase.io
import numpy as np
import pytest
import zstandard

from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import DataError

FRAMES = """2
Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.5 temperature=300 pbc="F F F"
O 0.0 0.0 0.0 0.1 0.0 0.0
H 0.0 0.0 1.0 -0.1 0.0 0.0
3
Lattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3:tags:I:1:move_mask:L:1 REF_energy=-2.5 pbc="T T F"
Cu 0.0 0.0 0.0 0 F
Cu 0.0 0.0 2.0 1 T
O 0.0 0.0 4.0 2 T

1
Properties=species:S:1:pos:R:3:REF_forces:R:3 free_energy=-9.0
H 7.0 0.0 0.0 0.5 0.0 0.0
"""


@pytest.fixture
def xyz(tmp_path):
    path = tmp_path / "data.extxyz"
    path.write_text(FRAMES)
    return path


def read_all(path, order=None, **keys):
    source = open_source(path, **keys)
    try:
        return [source.read(int(i)) for i in (range(len(source)) if order is None else order)]
    finally:
        source.close()


def test_hand_written_frames(xyz):
    water, slab, atom = read_all(xyz)
    assert water.atomic_numbers.tolist() == [8, 1]
    assert water.energy == -1.5
    np.testing.assert_array_equal(water.forces, [[0.1, 0, 0], [-0.1, 0, 0]])
    assert not water.pbc.any()
    assert not water.cell.any()
    assert water.positions.dtype == water.cell.dtype == np.float64
    assert water.source == "data.extxyz#0"

    assert slab.energy == -2.5
    assert np.isnan(slab.forces).all()
    assert slab.forces.shape == (3, 3)
    assert slab.tags.tolist() == [0, 1, 2]
    assert slab.fixed.tolist() == [True, False, False]
    assert slab.pbc.tolist() == [True, True, False]
    np.testing.assert_array_equal(slab.cell, 5 * np.eye(3))

    assert np.isnan(atom.energy)  # free_energy is another quantity
    np.testing.assert_array_equal(atom.forces, [[0.5, 0, 0]])


def test_named_keys(xyz):
    assert [s.energy for s in read_all(xyz, energy_key="free_energy")] == [
        pytest.approx(np.nan, nan_ok=True)
    ] * 2 + [-9.0]
    forces = [s.forces for s in read_all(xyz, forces_key="REF_forces")]
    assert np.isnan(forces[0]).all()
    assert forces[2][0, 0] == 0.5
    with pytest.raises(DataError) as error:
        open_source(xyz, energy_key="E", forces_key="F")
    assert "no energy label 'E' in the first 3 systems" in str(error.value)
    assert "REF_energy, energy, free_energy, temperature" in str(error.value)
    assert "no forces label 'F'" in str(error.value)
    assert "REF_forces, forces" in str(error.value)


def test_warns_if_the_first_system_has_only_other_numbers(tmp_path, caplog):
    path = tmp_path / "a.xyz"
    path.write_text("1\nProperties=species:S:1:pos:R:3 my_energy=-3.0\nH 0 0 0\n")
    assert np.isnan(read_all(path)[0].energy)
    assert "my_energy" in caplog.text


def test_fixed_column_and_partial_constraints(tmp_path):
    path = tmp_path / "a.extxyz"
    path.write_text(
        "2\nProperties=species:S:1:pos:R:3:fixed:I:1\nH 0 0 0 1\nH 0 0 1 0\n"
        "2\nProperties=species:S:1:pos:R:3:move_mask:L:3\nH 0 0 0 F F F\nH 0 0 1 F F T\n"
    )
    a, b = read_all(path)
    assert a.fixed.tolist() == [True, False]
    assert b.fixed.tolist() == [True, False]  # an atom that may slide is not held


def test_plain_xyz_with_cell_vectors(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text("1\ncomment\nHe 0 0 0\nVEC1 3 0 0\nVEC2 0 3 0\nVEC3 0 0 3\n1\n\nNe 1 0 0\n")
    a, b = read_all(path)
    np.testing.assert_array_equal(a.cell, 3 * np.eye(3))
    assert b.atomic_numbers.tolist() == [10]


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_equals_plain(lmdb_folder, tmp_path, monkeypatch, suffix, same_system):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    plain = lmdb_folder / "raw" / "0.extxyz"
    packed = tmp_path / f"0.extxyz{suffix}"
    packed.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    systems = read_all(plain)
    order = np.random.default_rng(1).permutation(len(systems))
    for i, system in zip(order, read_all(packed, order), strict=True):
        same_system(system, systems[i])
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("suffix", COMPRESS)
def test_file_of_several_compressed_parts(tmp_path, suffix):
    """What parallel compressors write."""
    packed = tmp_path / f"a.xyz{suffix}"
    half = FRAMES.index("3\n")
    packed.write_bytes(COMPRESS[suffix](FRAMES[:half].encode()) + COMPRESS[suffix](FRAMES[half:].encode()))
    assert [s.n_atoms for s in read_all(packed)] == [2, 3, 1]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_cut_off_compressed_file(lmdb_folder, tmp_path, suffix):
    packed = tmp_path / f"0.extxyz{suffix}"
    data = COMPRESS[suffix]((lmdb_folder / "raw" / "0.extxyz").read_bytes())
    packed.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"0\.extxyz.*(cut off|the file ends after)"):
        open_source(packed)
    packed.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"0\.extxyz.*cut off"):
        open_source(packed)
    packed.write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match=r"0\.extxyz.*(damaged|cannot be unpacked)"):
        open_source(packed)


def test_equals_ase_and_truth(lmdb_folder, truth):
    for file in sorted((lmdb_folder / "raw").glob("*.extxyz")):
        fids = [int(line.split(",")[1][5:]) for line in file.with_suffix(".txt").read_text().split()]
        sid = int(file.with_suffix(".txt").read_text().split(",")[0][6:])
        for system, atoms, fid in zip(read_all(file), ase.io.read(file, ":"), fids, strict=True):
            np.testing.assert_array_equal(system.positions, atoms.positions)
            np.testing.assert_array_equal(system.forces, atoms.get_forces(apply_constraint=False))
            true = truth[sid, fid]
            assert system.energy == pytest.approx(true["raw_energy"], abs=1e-9)
            np.testing.assert_array_equal(system.fixed, true["fixed"] == 1)
            np.testing.assert_array_equal(system.tags, true["tags"])
            np.testing.assert_allclose(system.forces, true["force"], atol=1e-8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FRAMES[:200], r"system 1: the file ends after 0 of 3 atoms.*cut off"),
        (FRAMES.replace("\n3\n", "\nthree\n"), "system 1: expected a number of atoms"),
        (FRAMES.replace("\n3\n", "\n2\n"), "system 2: expected a number of atoms"),
        (FRAMES.replace("2\n", "-2\n", 1), "system 0: expected a number of atoms"),
        ("", "no systems"),
        ("\n\n", "no systems"),
        ("\x00\xff\x00 binary", "system 0: expected a number"),
    ],
)
def test_broken_structure_of_the_file(tmp_path, text, message):
    path = tmp_path / "a.extxyz"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"(?s)a\.extxyz.*{message}"):
        open_source(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Cu 0.0 0.0 2.0 1 T", "Cu 0.0 0.0 2.0"),
        ("Cu 0.0", "Qq 0.0"),
        ("Cu 0.0", "Cu zero"),
        ("5 0 0 0 5", "5 0 0 0"),
    ],
)
def test_broken_frame_is_named_and_others_stay_readable(tmp_path, old, new):
    path = tmp_path / "a.extxyz"
    path.write_text(FRAMES.replace(old, new, 1))
    source = open_source(path)
    with pytest.raises(DataError, match=r"a\.extxyz, system 1: .*Correct this frame"):
        source.read(1)
    assert source.read(2).n_atoms == 1
    source.close()


def test_threads_share_a_source(lmdb_folder, same_system):
    source = open_source(lmdb_folder / "raw" / "0.extxyz")
    expected = [source.read(i) for i in range(len(source))]
    order = np.random.default_rng(2).integers(0, len(source), 200)
    with ThreadPoolExecutor(4) as pool:
        for i, system in zip(order, pool.map(lambda i: source.read(int(i)), order), strict=True):
            same_system(system, expected[i])
    source.close()


def test_unreadable_file(xyz, monkeypatch):
    def forbidden(self, *_args, **_options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", forbidden)
    with pytest.raises(DataError, match=r"data\.extxyz: cannot be opened .*Permission denied"):
        open_source(xyz)


def test_no_disk_space_for_unpacking(tmp_path, monkeypatch):
    packed = tmp_path / "a.xyz.gz"
    packed.write_bytes(gzip.compress(FRAMES.encode()))

    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full_disk)
    with pytest.raises(DataError, match="TMPDIR"):
        open_source(packed)
