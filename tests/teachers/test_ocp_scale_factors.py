"""Scale factors from the four places where they have been, and from a file of the user."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ocp_files import changed, checkpoint_path, frames, read, settings_of

from molkd.pipeline.errors import TeacherError
from molkd.pipeline.graphs.batch import batch_from_systems
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.teachers.load import load_teacher
from molkd.pipeline.teachers.ocp.scale_factors import fill_scale_factors, read_scale_file

REAL = Path(__file__).parents[3] / "shared/reference/real_scale_factors"


def load(path, scale_file=None):
    return load_teacher(str(path), device="cpu", scale_file=scale_file)


def energies(teacher):
    batch = batch_from_systems(frames()[:3], teacher.neighbor_rule)
    return teacher.compute(batch, ["energy"])["energy"]


def factors(name):
    return {k: v.item() for k, v in read(name, "ocp2022_scale_dict_ddp")["scale_dict"].items()}


def without_factors(content):
    """The layout of July 2022: a path to a file that is elsewhere."""
    del content["scale_dict"]


@pytest.mark.parametrize("name", ["painn", "gemnet_oc"])
def test_a_checkpoint_without_factors_is_refused_with_the_remedy(tmp_path, name):
    path = changed(name, "ocp2022_scale_dict_ddp", without_factors, tmp_path / "x.pt")
    n = len(factors(name))
    with pytest.raises(TeacherError) as error:
        load(path)
    for part in (f"{path}: {n} of {n} scale factors are unknown", "scaling_factors.pt", "--scale-file"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["painn", "gemnet_oc"])
@pytest.mark.parametrize("kind", ["json", "pt", "parameters.pt"])
def test_a_scale_file_gives_what_the_checkpoint_lacks(tmp_path, name, kind):
    path = changed(name, "ocp2022_scale_dict_ddp", without_factors, tmp_path / "x.pt")
    scale_file = tmp_path / f"factors.{kind}"
    if kind == "json":
        scale_file.write_text(json.dumps({"comment": name} | factors(name)))
    elif kind == "pt":
        torch.save({k: torch.tensor(v) for k, v in factors(name).items()}, scale_file)
    else:
        torch.save({k: torch.nn.Parameter(torch.tensor(v)) for k, v in factors(name).items()}, scale_file)
    teacher = load(path, scale_file)
    whole = load(checkpoint_path(name, "ocp2022_scale_dict_ddp"))
    torch.testing.assert_close(energies(teacher), energies(whole), rtol=1e-12, atol=0)
    assert teacher.info.extra["scale_factors"] == str(scale_file)
    # The same weights with other factors are another teacher; a store tells them apart by the config.
    assert teacher.info.config != whole.info.config


@pytest.mark.parametrize("place", ["beside", "absolute"])
def test_a_path_in_the_config_is_followed_if_the_file_is_there(tmp_path, place):
    def name_file(content):
        without_factors(content)
        at = "scale/painn.json" if place == "beside" else str(tmp_path / "scale/painn.json")
        settings_of(content)["scale_file"] = at

    path = changed("painn", "ocp2022_scale_dict_ddp", name_file, tmp_path / "x.pt")
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale/painn.json").write_text(json.dumps(factors("painn")))
    found = energies(load(path))
    whole = energies(load(checkpoint_path("painn", "ocp2022_scale_dict_ddp")))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)


def test_a_path_in_the_config_is_not_read_where_factors_are_known(tmp_path):
    def name_file(content):
        settings_of(content)["scale_file"] = "hostile.pt"

    (tmp_path / "hostile.pt").write_bytes(b"nothing that could be read")
    load(changed("painn", "ocp2022_scale_dict_ddp", name_file, tmp_path / "x.pt"))


@pytest.mark.parametrize("value", [0.0, 1e-9])
def test_zero_in_the_state_dict_means_not_fitted(tmp_path, value):
    def reset(content):
        for key in content["state_dict"]:
            if key.endswith("upd_out_scalar_scale_1.scale_factor"):
                content["state_dict"][key] = torch.tensor(value)

    path = changed("painn", "best_checkpoint", reset, tmp_path / "x.pt")
    if value:
        load(path)
        return
    with pytest.raises(
        TeacherError, match=r"1 of 2 scale factors are unknown: upd_out_scalar_scale_1\. Without"
    ):
        load(path)


def test_a_file_of_ones_stands_for_a_model_trained_without_scaling(tmp_path):
    def reset(content):
        for key, value in content["state_dict"].items():
            if key.endswith("scale_factor"):
                value.zero_()

    path = changed("painn", "best_checkpoint", reset, tmp_path / "x.pt")
    scale_file = tmp_path / "ones.json"
    scale_file.write_text(json.dumps(dict.fromkeys(factors("painn"), 1.0)))
    teacher = load(path, scale_file)
    unscaled = load(checkpoint_path("painn", "best_checkpoint"))
    with torch.no_grad():
        for key, value in unscaled.potential.model.state_dict().items():
            if key.endswith("scale_factor"):
                value.zero_()  # the identity
    torch.testing.assert_close(energies(teacher), energies(unscaled), rtol=1e-12, atol=0)


def test_two_places_that_disagree_are_named(tmp_path):
    other = factors("painn") | {"upd_out_scalar_scale_1": 7.0}
    scale_file = tmp_path / "other.json"
    scale_file.write_text(json.dumps(other))
    with pytest.raises(
        TeacherError, match=r"upd_out_scalar_scale_1 is 1\.14\d* in scale_dict and 7 in .*other\.json"
    ):
        load(checkpoint_path("painn", "ocp2022_scale_dict_ddp"), scale_file)
    scale_file.write_text(json.dumps(factors("painn")))
    load(checkpoint_path("painn", "ocp2022_scale_dict_ddp"), scale_file)  # the same is fine


def test_factors_of_no_layer_are_told(tmp_path, caplog):
    def add(content):
        content["scale_dict"]["upd_out_scalar_scale_2"] = torch.tensor(1.5)

    load(changed("painn", "ocp2022_scale_dict_ddp", add, tmp_path / "x.pt"))
    assert "scale factors of no layer of the model: upd_out_scalar_scale_2" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1, 2]", "expected scale factors by name, found list"),
        ('{"a": "many"}', "scale factor a should be a positive number, found 'many'"),
        ('{"a": -1}', "found -1"),
        ('{"a": NaN}', "found nan"),
        ('{"a": [1, 2]}', r"found \[1, 2\]"),
    ],
)
def test_scale_files_that_hold_something_else(tmp_path, text, message):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(TeacherError, match=r"f\.json.*" + message):
        read_scale_file(tmp_path / "f.json")


def test_scale_files_are_read_without_running_them(tmp_path):
    torch.save({"a": np.ones(3)}, tmp_path / "f.pt")
    with pytest.raises(TeacherError, match=r"f\.pt: refused, its pickle asks for numpy\S*_reconstruct"):
        read_scale_file(tmp_path / "f.pt")
    with pytest.raises(TeacherError, match="no such file"):
        read_scale_file(tmp_path / "g.pt")
    with pytest.raises(TeacherError, match="cannot be opened"):
        read_scale_file(tmp_path)


def test_teachers_without_scale_factors_refuse_a_scale_file(tmp_path):
    scale_file = tmp_path / "f.json"
    scale_file.write_text("{}")
    with pytest.raises(TeacherError, match="SchNet has no scale factors"):
        load(checkpoint_path("schnet", "best_checkpoint"), scale_file)
    demo = Path(shutil.__file__).with_name("x.safetensors")
    with pytest.raises(TeacherError, match="takes no scale factors, only checkpoints of OCP do"):
        load(demo, scale_file)


@pytest.mark.skipif(not REAL.exists(), reason=f"no published scale factors at {REAL}")
@pytest.mark.parametrize(
    ("config", "files"),
    [
        (
            {"name": "painn", "hidden_channels": 4, "num_layers": 6, "num_rbf": 4},
            ("painn_nb6_scaling_factors.pt", "painn_nb6_oc20.json"),
        ),
        ({"name": "gemnet_oc", "num_radial": 4}, ("gemnet-oc.pt", "gemnet_oc_oc20.json")),
    ],
)
def test_the_published_files_fit_the_published_models(config, files, caplog):
    found = []
    for file in files:
        model = build_model(config)
        fill_scale_factors(model, {}, {}, None, Path("x.pt"), REAL / file)
        found.append({k: v.item() for k, v in model.state_dict().items() if k.endswith("scale_factor")})
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert all(value > 0 for value in found[0].values())
    assert caplog.text == ""
