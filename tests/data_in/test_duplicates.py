"""Which of several equal structures is kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molkd.pipeline.data.duplicates import resolve_duplicates
from molkd.pipeline.errors import DataError

NAN = np.nan


def resolve(which, energies, has_forces, **options):
    ids = np.zeros((len(which), 16), np.uint8)
    ids[:, -1] = which  # a trailing byte, and ids that begin with zeros
    names = [f"f.xyz#{i}" for i in range(len(which))]
    return resolve_duplicates(
        ids, np.array(energies, float), np.array(has_forces, bool), names, **options
    ).tolist()


@pytest.mark.parametrize(
    ("which", "energies", "has_forces", "keep"),
    [
        ([], [], [], []),
        ([2, 1, 0], [1, 1, NAN], [1, 0, 0], [1, 1, 1]),
        ([0, 1, 0], [1, 2, 1 + 5e-7], [1, 1, 1], [1, 1, 0]),
        ([0, 0], [NAN, 1], [0, 0], [0, 1]),
        ([0, 0, 0], [NAN, 1, 1], [0, 0, 1], [0, 0, 1]),
        ([0, 0], [NAN, NAN], [0, 1], [0, 1]),
        ([0, 0], [NAN, NAN], [0, 0], [1, 0]),
        ([0, 0, 0], [1, NAN, 1], [0, 1, 1], [0, 0, 1]),
    ],
)
def test_kept(which, energies, has_forces, keep):
    assert resolve(which, energies, has_forces) == [bool(k) for k in keep]


def test_different_energies():
    with pytest.raises(DataError) as error:
        resolve([3, 1, 3], [1.0, 5.0, 1.1], [1, 1, 0])
    assert "f.xyz#0 (1.000000 eV, forces) and f.xyz#2 (1.100000 eV, no forces)" in str(error.value)
    assert "on_conflict" in str(error.value)


def test_one_has_only_energy_the_other_only_forces():
    with pytest.raises(
        DataError, match=r"f\.xyz#1 \(1\.000000 eV, no forces\) and f\.xyz#0 \(no energy, forces\)"
    ):
        resolve([0, 0], [NAN, 1.0], [1, 0])


def test_conflict_may_be_settled_by_order(caplog):
    assert resolve([0, 0, 0], [NAN, 1.0, 2.0], [0, 1, 1], on_conflict="first") == [False, True, False]
    assert "twice with different labels" in caplog.text


@given(which=st.lists(st.integers(0, 5), max_size=20))
def test_one_of_each_id_stays(which):
    keep = resolve(which, [NAN] * len(which), [False] * len(which))
    assert [w for w, k in zip(which, keep, strict=True) if k] == list(dict.fromkeys(which))
