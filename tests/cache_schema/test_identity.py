import hashlib
import struct

import numpy as np

from molkd.cache_schema.identity import dataset_fingerprint, system_id

WATER = np.array([8, 1, 1]), np.array([[0, 0, 0], [0.75, 0.5, 0], [-0.75, 0.5, 0]])
BOX = np.diag([5.0, 6.0, 7.0])


def test_id_is_the_hash_of_the_documented_bytes():
    numbers, positions = WATER
    raw = b"molkd-system-1\0" + struct.pack(
        "<I3B9f9f3B", 3, 8, 1, 1, *positions.ravel(), *BOX.ravel(), 1, 0, 1
    )
    assert system_id(numbers, positions, BOX, [True, False, True]) == hashlib.sha256(raw).digest()[:16]


def test_id_of_a_molecule_does_not_depend_on_its_box_or_on_signs_of_zero():
    numbers, positions = WATER
    open_ = [False] * 3
    reference = system_id(numbers, positions, np.zeros((3, 3)), open_)
    assert system_id(numbers, positions, BOX, open_) == reference
    assert system_id(numbers, positions, -np.zeros((3, 3)), open_) == reference
    assert system_id(numbers, positions * -1.0 * -1.0, np.zeros((3, 3)), open_) == reference


def test_id_changes_with_the_last_bit_of_a_position():
    numbers, positions = WATER
    moved = positions.astype(np.float32)
    moved[2, 0] = np.nextafter(moved[2, 0], np.float32(1))
    none = np.zeros((3, 3)), [False] * 3
    assert system_id(numbers, moved, *none) != system_id(numbers, positions, *none)


def test_fingerprint_is_of_the_set():
    ids = np.random.default_rng(0).integers(0, 256, (20, 16)).astype(np.uint8)
    assert dataset_fingerprint(ids[::-1]) == dataset_fingerprint(ids)
    expected = hashlib.sha256(b"".join(sorted(bytes(row) for row in ids))).hexdigest()
    assert dataset_fingerprint(ids) == expected
