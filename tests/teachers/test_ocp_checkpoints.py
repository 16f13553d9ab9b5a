"""Every layout of checkpoint against the predictions of the code that wrote it."""

import numpy as np
import pytest
import torch
from ocp_files import CASES, changed, checkpoint_path, expected, frames, read, settings_of

from molkd.pipeline.errors import ModelError, TeacherError
from molkd.pipeline.graphs.batch import batch_from_systems
from molkd.pipeline.scope import Scope
from molkd.pipeline.teachers.load import load_teacher

# Of the largest value; fairchem's own numbers are float32, and PaiNN's random weights amplify its rounding.
FLOAT32 = 5e-6
BATCH = 8


def load(path, **options):
    return load_teacher(str(path), device="cpu", **options)


def predict(teacher, systems):
    """Energies (S,) and forces by system."""
    energies, forces = [], []
    for begin in range(0, len(systems), BATCH):
        part = systems[begin : begin + BATCH]
        out = teacher.compute(
            batch_from_systems(part, teacher.neighbor_rule, teacher.dtype), ["energy", "forces"]
        )
        energies.append(out["energy"])
        forces += [f.numpy() for f in out["forces"].split([s.n_atoms for s in part])]
    return torch.cat(energies).numpy(), forces


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_predictions_are_those_of_the_code_that_wrote_it(name, layout):
    energy, forces, clear = expected(name, layout)
    systems = [s for s, is_clear in zip(frames(), clear, strict=True) if is_clear]
    found_energy, found_forces = predict(load(checkpoint_path(name, layout)), systems)
    assert clear.sum() >= 20
    wanted = np.concatenate([f for f, is_clear in zip(forces, clear, strict=True) if is_clear])
    np.testing.assert_allclose(found_energy, energy[clear], rtol=0, atol=FLOAT32 * np.abs(energy).max())
    np.testing.assert_allclose(
        np.concatenate(found_forces), wanted, rtol=0, atol=FLOAT32 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("name", ["painn", "schnet", "gemnet_oc"])
def test_averaged_weights_are_taken_and_differ_from_raw_ones(name):
    averaged, final = (
        load(checkpoint_path(name, "checkpoint")),
        load(checkpoint_path(name, "best_checkpoint")),
    )
    raw = load(checkpoint_path(name, "ocp2023_state_dict_dp"))
    differs = False
    for key, value in averaged.potential.model.state_dict().items():
        torch.testing.assert_close(value, final.potential.model.state_dict()[key], rtol=0, atol=0)
        differs |= not torch.equal(value, raw.potential.model.state_dict()[key])
    assert differs
    assert averaged.info.extra["weights"] == "moving average (ema)"
    assert final.info.extra["weights"] == raw.info.extra["weights"] == "as in the state_dict"


def test_ema_that_does_not_fit_is_refused(tmp_path):
    def drop(content):
        content["ema"]["shadow_params"].pop(3)

    path = changed("painn", "checkpoint", drop, tmp_path / "x.pt")
    with pytest.raises(
        TeacherError, match=r"x\.pt: its averaged weights .* 42 tensors .* the 43 .*best_checkpoint"
    ):
        load(path)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.module."])
def test_any_number_of_wrappers(tmp_path, prefix):
    def rename(content):
        content["state_dict"] = {
            prefix + k.removeprefix("module."): v for k, v in content["state_dict"].items()
        }

    path = changed("schnet", "best_checkpoint", rename, tmp_path / "x.pt")
    systems = frames()[:4]
    np.testing.assert_array_equal(
        predict(load(path), systems)[0],
        predict(load(checkpoint_path("schnet", "best_checkpoint")), systems)[0],
    )


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("gemnet_oc", "ocpmodels.models.gemnet_oc.gemnet_oc.GemNetOC"),
        ("painn", "ocpmodels.models.painn.painn.PaiNN"),
        ("schnet", "fairchem.core.models.schnet.SchNetWrap"),
        ("schnet", "SchNet"),
    ],
)
@pytest.mark.parametrize("layout", ["best_checkpoint", "ocp2023_state_dict_dp"])
def test_architectures_under_the_names_of_their_classes(tmp_path, name, called, layout):
    def rename(content):
        config = content["config"]
        if isinstance(config["model"], str):
            config["model"] = called
        else:
            config["model"]["name"] = called

    path = changed(name, layout, rename, tmp_path / "x.pt")
    assert load(path).info.config["name"] == name


def test_hydra_with_heads_of_other_models_is_refused(tmp_path):
    def add_head(content):
        content["config"]["model"]["heads"]["stress"] = {"module": "rank2_symmetric_head"}

    path = changed("painn", "hydra", add_head, tmp_path / "x.pt")
    with pytest.raises(
        TeacherError, match=r"stress \(rank2_symmetric_head\).*painn_energy_head and painn_force_head"
    ):
        load(path)


def test_hydra_whose_heads_differ_in_depth_is_refused(tmp_path):
    def change(content):
        content["config"]["model"]["heads"]["forces"]["num_global_out_layers"] = 3

    with pytest.raises(TeacherError, match="heads have different settings"):
        load(changed("gemnet_oc", "hydra", change, tmp_path / "x.pt"))


def test_old_settings_without_effect_are_silent_and_unknown_ones_are_named(tmp_path, caplog):
    def add(content):
        settings = settings_of(content)
        settings.update(
            otf_graph=True, use_pbc_single=False, readout="add", num_targets=1, output_init="zeros"
        )

    load(changed("schnet", "ocp2023_state_dict_dp", add, tmp_path / "x.pt"))
    assert caplog.text == ""
    load(
        changed(
            "schnet", "ocp2023_state_dict_dp", lambda c: settings_of(c).update(quirk=3), tmp_path / "y.pt"
        )
    )
    assert "y.pt: settings of its config that schnet does not know are ignored: quirk" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("painn", {"rbf": {"name": "spherical_bessel"}}, "rbf is {'name': 'spherical_bessel'}, supported is"),
        ("painn", {"envelope": {"name": "exponential"}}, "envelope is"),
        ("painn", {"num_elements": 100}, "num_elements is 100, supported is 83"),
        ("painn", {"direct_forces": False}, "direct_forces is False"),
        ("schnet", {"readout": "mean"}, "readout is 'mean', supported is 'add' or 'sum'"),
        ("schnet", {"hidden_channels": "many"}, "hidden_channels"),
        ("gemnet_oc", {"rbf": {"name": "spherical_bessel"}}, "rbf"),
        ("gemnet_oc", {"rbf_spherical": {"name": "bernstein"}}, "rbf_spherical is"),
        ("gemnet_oc", {"cbf": {"name": "gaussian_outer"}}, "cbf"),
        ("gemnet_oc", {"sbf": {"name": "spherical_harmonics"}}, "sbf"),
        ("gemnet_oc", {"sbf": None}, "sbf"),  # what OCP takes then, our model does not have
        ("gemnet_oc", {"activation": "relu"}, "activation"),
        ("gemnet_oc", {"scale_basis": True}, "scale_basis is True, supported is False"),
        ("gemnet_oc", {"symmetric_edge_symmetrization": True}, "symmetric_edge_symmetrization is True"),
    ],
)
def test_a_setting_that_changes_the_model_is_refused(tmp_path, name, settings, named):
    path = changed(name, "best_checkpoint", lambda c: settings_of(c).update(settings), tmp_path / "x.pt")
    with pytest.raises(TeacherError) as error:
        load(path)
    assert str(path) in str(error.value)
    assert named in str(error.value)


def test_a_config_that_is_silent_means_the_defaults_of_ocp(tmp_path):
    """There quadruplets, atom interactions and direct forces are off unless asked for, the cutoff is 6 A."""

    def shorten(content):
        for key in ("cutoff", "max_neighbors", "quad_interaction"):
            del settings_of(content)[key]

    with pytest.raises(TeacherError, match=r"left over .*cbf_basis_qint\.radial_basis\.rbf\.offset"):
        load(changed("gemnet_oc", "best_checkpoint", shorten, tmp_path / "x.pt"))

    def without_size(content):
        del settings_of(content)["emb_size_cbf"]

    with pytest.raises(TeacherError, match="lacks emb_size_cbf"):
        load(changed("gemnet_oc", "best_checkpoint", without_size, tmp_path / "y.pt"))


def test_without_atom_to_edge_messages_nothing_is_left_over(tmp_path):
    """Edge to atom alone has the radial basis of both in its state_dict, which only the other one reads."""

    def shorten(content):
        settings_of(content)["atom_edge_interaction"] = False
        parts = ("atom_edge_interaction.", "cbf_basis_aeint.", "mlp_rbf_aeint.", "mlp_cbf_aeint.")
        for key in [key for key in content["state_dict"] if any(part in key for part in parts)]:
            del content["state_dict"][key]
        assert any("radial_basis_aeaint." in key for key in content["state_dict"])

    load(changed("gemnet_oc", "best_checkpoint", shorten, tmp_path / "x.pt"))


def test_ties_are_kept_where_the_config_says_so(tmp_path):
    path = changed(
        "gemnet_oc",
        "best_checkpoint",
        lambda c: settings_of(c).update(enforce_max_neighbors_strictly=False),
        tmp_path / "x.pt",
    )
    assert load(path).neighbor_rule.tie_tolerance > 0
    assert load(checkpoint_path("gemnet_oc", "best_checkpoint")).neighbor_rule.tie_tolerance == 0


def test_elements_end_with_the_embedding():
    teacher = load(checkpoint_path("gemnet_oc", "best_checkpoint"))
    assert teacher.atomic_numbers == frozenset(range(1, 84))
    scope = Scope(teacher.info.name, teacher.atomic_numbers, teacher.neighbor_rule)
    from dataclasses import replace

    system = frames()[0]
    scope.check(system)
    numbers = system.atomic_numbers.copy()
    numbers[0] = 84
    with pytest.raises(ModelError, match=r"Po \(atomic number 84\)"):
        scope.check(replace(system, atomic_numbers=numbers))


@pytest.mark.parametrize("name", ["painn", "schnet", "gemnet_oc"])
def test_files_called_after_their_role_take_the_name_of_their_folder(name):
    assert load(checkpoint_path(name, "best_checkpoint")).info.name == name
    assert load(checkpoint_path(name, "ocp2023_state_dict_dp")).info.name == "ocp2023_state_dict_dp"


def test_provenance_tells_weights_and_scale_factors():
    info = load(checkpoint_path("painn", "ocp2022_scale_dict_ddp")).info
    assert info.extra["scale_factors"] == "scale_dict"
    assert info.extra["label_scale"]["energy_std"] == pytest.approx(2.887317180633545)
    assert "adsorption energies" in info.energy_reference
    assert (
        read("painn", "checkpoint")["step"] == load(checkpoint_path("painn", "checkpoint")).info.extra["step"]
    )
