"""Means, standard deviations and references of elements, in all forms, against hand-worked numbers."""

import numpy as np
import pytest
import torch
from ocp_files import changed, checkpoint_path, frames

from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.graphs.batch import batch_from_systems
from molkd.pipeline.teachers.load import load_teacher
from molkd.pipeline.teachers.ocp.normalization import read_label_scale, reference_in_words

PATH = "x.pt"
T = torch.tensor
NEW = {"energy": {"mean": T(-0.5), "rmsd": T(2.0)}, "forces": {"mean": T(0.0), "rmsd": T(3.0)}}
OLD = {"target": {"mean": T(-0.5), "std": T(2.0)}, "grad_target": {"mean": T(0.0), "std": T(3.0)}}
DATASET = {"target_mean": -0.5, "target_std": 2.0, "grad_target_mean": 0.0, "grad_target_std": 3.0}
EXPECTED = LabelScale(-0.5, 2.0, 3.0)


@pytest.mark.parametrize(
    "content",
    [
        {"normalizers": NEW},
        {"normalizers": OLD},
        {"normalizers": {"target": {"mean": -0.5, "std": np.float64(2)}, "grad_target": {"std": T([3.0])}}},
        {"normalizers": {}, "config": {"dataset": {"normalize_labels": True, **DATASET}}},
        {"config": {"dataset": [{"normalize_labels": True, **DATASET}, {"src": "val"}]}},
        {
            "normalizers": {},
            "config": {
                "dataset": {
                    "train": {
                        "transforms": {
                            "normalizer": {
                                "energy": {"mean": -0.5, "stdev": 2.0},
                                "forces": {"mean": 0.0, "rmsd": 3},
                            }
                        }
                    }
                }
            },
        },
        {"normalizers": NEW, "config": {"dataset": {"normalize_labels": True, "target_std": 99.0}}},
    ],
)
def test_every_form_of_the_same_scale(content):
    assert read_label_scale(content, PATH) == EXPECTED


@pytest.mark.parametrize(
    "content",
    [{}, {"normalizers": {}}, {"config": {"dataset": {"normalize_labels": False, **DATASET}}}],
)
def test_nothing_said_means_nothing_scaled(content):
    assert read_label_scale(content, PATH) == LabelScale(0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("normalizers", "message"),
    [
        ({"energy": {"mean": T(0.0), "rmsd": T([1.0, 2.0])}}, "energy should be one number"),
        ({"energy": {"mean": "0", "rmsd": T(1.0)}}, "energy should be one number, found '0'"),
        ({"energy": {"mean": T(0.0), "rmsd": T(0.0)}}, "makes no sense"),
        ({"energy": {"mean": T(torch.nan), "rmsd": T(1.0)}}, "makes no sense"),
        ({"forces": {"mean": T(0.1), "rmsd": T(1.0)}}, "forces have a mean of"),
        ({"stress": {"mean": T(0.1), "rmsd": T(1.0)}}, "it normalises stress, expected energy and forces"),
    ],
)
def test_scales_that_cannot_be_followed(normalizers, message):
    with pytest.raises(TeacherError, match=r"^x\.pt: .*" + message):
        read_label_scale({"normalizers": normalizers}, PATH)


def test_references_of_elements_are_added_per_atom(tmp_path):
    table = torch.zeros(119)
    table[6], table[8], table[29] = -3.0, -5.0, 0.25

    def add(content):
        content["elementrefs"] = {"energy": {"element_references": table}}

    path = changed("schnet", "best_checkpoint", add, tmp_path / "x.pt")
    plain = load_teacher(str(checkpoint_path("schnet", "best_checkpoint")), device="cpu")
    with_references = load_teacher(str(path), device="cpu")
    batch = batch_from_systems(frames(), plain.neighbor_rule)
    signals = ["energy", "atomic_energies"]
    before, after = plain.compute(batch, signals), with_references.compute(batch, signals)
    of_atoms = table[batch.atomic_numbers].double()
    offset = torch.zeros(batch.n_systems, dtype=torch.float64).index_add(0, batch.system_idx, of_atoms)
    assert len(offset.unique()) == 3
    torch.testing.assert_close(after["energy"], before["energy"] + offset, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        after["atomic_energies"], before["atomic_energies"] + of_atoms, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    ("elementrefs", "message"),
    [
        ({"forces": {"element_references": T([0.0])}}, "references of elements for forces"),
        ({"energy": {"element_references": 3}}, "no list of energies"),
    ],
)
def test_references_that_cannot_be_followed(elementrefs, message):
    with pytest.raises(TeacherError, match=message):
        read_label_scale({"elementrefs": elementrefs}, PATH)


def test_linear_references_of_the_labels_are_told():
    words = reference_in_words({"config": {"dataset": {"lin_ref": "oc22_linfit_coeffs.npz"}}})
    assert "linear references of oc22_linfit_coeffs.npz" in words
    assert "linear references" not in reference_in_words({})
