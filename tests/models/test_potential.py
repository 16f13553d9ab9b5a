"""Model files: damage is told by name; references are on the device once."""

import json

import numpy as np
import pytest
import torch
from ase.build import molecule
from safetensors.torch import save_file

from molkd.pipeline.data.ase_source import record_from_atoms
from molkd.pipeline.data.records import build_system
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.errors import ModelError
from molkd.pipeline.graphs.batch import batch_from_systems, to_device
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model

CONFIG = {"name": "schnet", "hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "cutoff": 3.0}
SCALE = {"energy_mean": 0.0, "energy_std": 1.0, "forces_std": 1.0, "references": {}}


def water(rule):
    system = build_system(record_from_atoms(molecule("H2O")), (), (), "water")
    return batch_from_systems([system], rule)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ('{"format": 1, ', "damaged metadata"),
        ("[1]", "do not describe a model"),
        ({"format": 1, "scale": SCALE}, "'model' is missing"),
        ({"format": 1, "model": CONFIG}, "'scale' is missing"),
        ({"format": 1, "model": "schnet", "scale": SCALE}, "do not describe a model"),
        ({"format": 1, "model": {"name": "x"}, "scale": SCALE}, "unknown architecture 'x'"),
        ({"format": 1, "model": CONFIG, "scale": {**SCALE, "energy_std": 0.0}}, "do not describe a model"),
        ({"format": 1, "model": CONFIG, "scale": SCALE, "provenance": 3}, "do not describe a model"),
        ({"format": 2}, "model format 2, this version reads 1; upgrade molkd"),
        ({"format": 1, "model": CONFIG, "scale": SCALE}, "weights do not fit"),
    ],
)
def test_metadata_that_describe_no_model(tmp_path, metadata, says):
    path = tmp_path / "broken.safetensors"
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file({"x": torch.zeros(1)}, path, {"molkd": text})
    with pytest.raises(ModelError, match=rf"broken\.safetensors: .*{says}"):
        Potential.load(path)


def test_references_are_added_once_an_atom():
    torch.manual_seed(0)
    model = build_model(CONFIG)
    batch = water(model.neighbor_rule)
    bare = Potential(model, LabelScale()).predict(batch)["energy"]
    potential = Potential(model, LabelScale(references={1: -13.5, 8: -2041.0}))
    for _ in range(2):
        offset = (potential.predict(batch)["energy"] - bare).item()
        np.testing.assert_allclose(offset, 2 * -13.5 - 2041.0, rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_prediction_on_cuda_does_not_wait_for_a_copy():
    potential = Potential(build_model(CONFIG), LabelScale(references={1: -13.5}))
    potential.to("cuda").model.requires_grad_(False)
    batch = to_device(water(potential.neighbor_rule), torch.device("cuda"))
    potential.predict(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        table = potential._reference_table(batch.positions.device)
        table[batch.atomic_numbers]
    finally:
        torch.cuda.set_sync_debug_mode("default")
