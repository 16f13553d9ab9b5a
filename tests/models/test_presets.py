"""Presets: the paper's numbers, valid settings, errors that help."""

import json
from pathlib import Path

import pytest

from molkd.pipeline.config import TrainingConfig, make_config
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.models.registry import MODELS, build_model, load_preset, preset_names

LISTS = Path(__file__).parents[1] / "data" / "models" / "param_lists"


def resolved(settings):
    return make_config(MODELS[settings["name"]].config_class, settings)


@pytest.mark.parametrize("path", sorted(LISTS.glob("*.json")), ids=lambda p: p.stem)
def test_paper_presets_are_the_paper_models(path):
    listed = json.loads(path.read_text())["model"]
    listed.pop("otf_graph", None)
    preset = load_preset(path.stem.replace("_", "-"), periodic=path.stem.endswith("oc20"))
    assert resolved(preset["model"]) == resolved(listed)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("periodic", [False, True])
def test_every_preset_is_complete_and_valid(name, periodic):
    preset = load_preset(name, periodic=periodic)
    assert preset.keys() == {"model", "training"}
    assert resolved(preset["model"]).use_pbc is periodic
    training = make_config(TrainingConfig, preset["training"])
    unset = set(TrainingConfig.model_fields) - training.model_fields_set
    assert unset == {"max_steps", "gradient_weight"}  # the latter is nothing of the paper's


def test_families_follow_the_data():
    for family in ("gemnet-oc", "gemnet-oc-small", "painn-small", "painn-big", "schnet"):
        for periodic, ending in ((True, "oc20"), (False, "coll")):
            assert load_preset(family, periodic=periodic) == load_preset(
                f"{family}-{ending}", periodic=periodic
            )
    assert load_preset("painn-small", periodic=True)["training"]["schedule"]["milestones"][0] == 160_000


@pytest.mark.parametrize("name", ["painn_small", "painnsmall", "PaiNN-small"])
def test_unknown_preset_names_the_nearest(name):
    with pytest.raises(ConfigError, match=r"did you mean painn-small.*schnet-tiny"):
        load_preset(name, periodic=False)


def test_unknown_architecture_and_setting():
    with pytest.raises(ConfigError, match=r"'dimenet'.*gemnet_oc, painn, schnet"):
        build_model({"name": "dimenet"})
    with pytest.raises(ConfigError, match=r"did you mean hidden_channels"):
        build_model({"name": "painn", "hiden_channels": 64})
    with pytest.raises(ConfigError, match=r"hidden_channels"):
        build_model({"name": "painn", "hidden_channels": 63})


def test_medium_gives_conservative_forces_and_tiny_direct_ones():
    assert build_model(load_preset("painn-medium", periodic=False)["model"]).forces_from == "gradient"
    assert build_model(load_preset("painn-tiny", periodic=False)["model"]).forces_from == "direct"


def test_quadruplets_follow_the_tags_only_where_tags_are_those_of_oc20():
    for name in preset_names():
        for periodic in (True, False):
            settings = resolved(load_preset(name, periodic=periodic)["model"])
            if settings.name == "gemnet_oc":
                is_oc20 = name.endswith("oc20") or (periodic and name in ("gemnet-oc", "gemnet-oc-small"))
                assert settings.qint_tags == ((1, 2) if is_oc20 else (0, 1, 2)), name


def test_small_gemnet_oc_is_the_paper_one_but_for_its_size():
    for ending in ("oc20", "coll"):
        big, small = (
            load_preset(f"gemnet-oc{size}-{ending}", periodic=ending == "oc20") for size in ("", "-small")
        )
        sizes = {"num_blocks": 3, "emb_size_atom": 128, "emb_size_edge": 256}
        assert small["model"] == big["model"] | sizes
        assert small["training"] == big["training"] | {"batch_size": 32, "lr": 5e-4}


@pytest.mark.parametrize(("name", "n_parameters"), [("tiny", 300_000), ("medium", 2_000_000)])
def test_gemnet_oc_for_a_laptop_stays_small(name, n_parameters):
    model = build_model(load_preset(f"gemnet-oc-{name}", periodic=False)["model"])
    assert model.forces_from == "direct"
    assert sum(p.numel() for p in model.parameters()) < n_parameters
