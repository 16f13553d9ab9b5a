"""SevenNet-0 against the package's own calculator, and its ways to fail."""

import sys

import numpy as np
import pytest
import torch
from ase.build import bulk
from teacher_cases import batch_of, structures

from molkd.pipeline.errors import TeacherError
from molkd.pipeline.teachers.load import load_teacher

# Float32 on both sides with sums in another order; energies of 46 eV, forces of some eV/A.
ENERGY = 5e-5  # eV
FORCES = 5e-5  # eV/A


@pytest.fixture(scope="module")
def teacher():
    pytest.importorskip("sevenn", reason="the package sevenn is not installed", exc_type=ImportError)
    return load_teacher("sevennet-0", device="cpu")


@pytest.mark.filterwarnings("ignore")  # the calculator's own notices
def test_agrees_with_its_own_calculator(teacher):
    from sevenn.calculator import SevenNetCalculator

    salt = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    iron = bulk("Fe", a=2.8)  # one atom, all its neighbors are images of itself
    salt.rattle(0.1, seed=2)
    systems = [*structures(), salt, iron]
    out = teacher.compute(batch_of(systems, teacher.neighbor_rule, torch.float32), list(teacher.signals))
    calculator = SevenNetCalculator("7net-0", device="cpu")
    row = 0
    for s, atoms in enumerate(systems):
        atoms.calc = calculator
        rows = slice(row, row + len(atoms))
        assert abs(out["energy"][s].item() - atoms.get_potential_energy()) < ENERGY
        np.testing.assert_allclose(out["forces"][rows], atoms.get_forces(), atol=FORCES)
        np.testing.assert_allclose(out["atomic_energies"][rows], calculator.results["energies"], atol=ENERGY)
        row = rows.stop


def test_knows_89_elements_and_says_where_it_comes_from(teacher):
    assert len(teacher.atomic_numbers) == 89
    assert {1, 26, 79, 94} <= teacher.atomic_numbers
    assert 84 not in teacher.atomic_numbers
    assert teacher.signals["node"].shape == (128,)
    assert teacher.signals["v2v"].shape == (3, 64)
    # of the checkpoint of 11 July 2024 as shipped
    assert teacher.info.weights_sha256.startswith("7052cb42b7b3be42")
    assert set(teacher.info.extra) == {"sevenn", "e3nn"}


def test_energy_reads_the_node_features(teacher):
    """The two linear layers of the energy head, applied to `node`, give the atomic energies."""
    batch = batch_of(structures(), teacher.neighbor_rule, torch.float32)
    out = teacher.compute(batch, ["node", "atomic_energies"])
    blocks = dict(teacher.model.named_children())
    data = {"x": out["node"]}
    for name in ("reduce_input_to_hidden", "reduce_hidden_to_energy"):
        data = blocks[name](data)
    rescale = blocks["rescale_atomic_energy"]
    types = teacher.type_idx[batch.atomic_numbers]
    energies = data["scaled_atomic_energy"].squeeze(1) * rescale.scale[types] + rescale.shift[types]
    torch.testing.assert_close(energies.double(), out["atomic_energies"], rtol=0, atol=1e-5)


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sevenn.util", None)
    with pytest.raises(TeacherError, match=r"pip install 'molkd\[sevenn\]'"):
        load_teacher("sevennet-0")


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the checkpoint was executed",))


def test_a_checkpoint_with_code_is_refused_unread(teacher, tmp_path, monkeypatch):
    import sevenn.util

    torch.save({"config": {}, "model_state_dict": Trap()}, tmp_path / "c.pth")
    monkeypatch.setattr(sevenn.util, "pretrained_name_to_path", lambda name: str(tmp_path / "c.pth"))
    with pytest.raises(TeacherError, match=r"c\.pth: the checkpoint names .*_Fail"):
        load_teacher("sevennet-0")
