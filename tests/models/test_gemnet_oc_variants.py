"""Settings of GemNet-OC that the stored cases leave as they are, against fairchem 1.10 in float64.

Expected values are fairchem's for the slab of gemnet_oc_a, with weights drawn by name; no neighbor of it is
near one of the limits of these settings.
"""

import json

import pytest
import torch
from ocp_reference import FLOAT64, FOLDER, batch_of, drawn_weight, load_case, relative_error

from molkd.pipeline.models.registry import build_model

REFERENCE = json.loads((FOLDER / "gemnet_oc_variants.json").read_text())
PLAIN = REFERENCE["variants"]["as it is"]


def model_of(variant):
    model = build_model(REFERENCE["model"] | variant["settings"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = drawn_weight(name, tuple(parameter.shape), REFERENCE["weight_recipe_seed"])
            parameter.copy_(torch.from_numpy(drawn))
    return model.double()


@pytest.mark.parametrize("name", REFERENCE["variants"])
def test_agrees_with_the_peer(name):
    variant = REFERENCE["variants"][name]
    model = model_of(variant)
    batch = batch_of(load_case("gemnet_oc_a", "case_slab")["inputs"], model.neighbor_rule, torch.float64)
    outputs = model(batch)
    squares = outputs["forces"].square().sum()
    for value, key in (
        (outputs["energy"], "energy"),
        (outputs["forces"][-1], "forces_of_last_atom"),
        (squares, "forces_sum_of_squares"),
    ):
        assert relative_error(value, torch.tensor(variant[key], dtype=torch.float64)) < FLOAT64, key
    torch.testing.assert_close(outputs["atomic_energies"].sum(), outputs["energy"][0])


def test_every_setting_shows():
    """A setting that the model ignored would not pass above: all numbers differ from the plain model's."""
    keys = ("energy", "forces_sum_of_squares")
    same = {
        name
        for name, variant in REFERENCE["variants"].items()
        if all(variant[key] == pytest.approx(PLAIN[key], rel=1e-6) for key in keys)
    }
    assert same == {"as it is"}
