"""`kd teacher info`, and checkpoints of OCP in the other commands."""

import json
from dataclasses import replace

import ase.io
import pytest
from ocp_files import changed, checkpoint_path, frames, read
from test_results import result_of

from molkd.cache_schema.reader import Cache
from molkd.pipeline.models.potential import Potential


def strip_factors(content):
    del content["scale_dict"]


def test_checkpoint_in_words(kd):
    path = checkpoint_path("painn", "checkpoint")
    result = kd("teacher", "info", path)
    assert result.code == 0, result.err
    for line in (
        "name           painn",
        "architecture   PaiNN, ",
        "weights        moving average (ema)",
        "scale factors  from the state_dict",
        "graph          cutoff 12 A, nearest 50, made symmetric, periodic",
        "elements       83: H to Bi",
        "labels         energy mean -0.755445 eV, std 2.88732 eV; forces std 2.88732 eV/A",
        "  num_layers = 2",
        "  node             (N, 16)     1     invariant  scalar features that the energy head reads",
        "  v2v              (N, 3, 16)  1     vector     vector features after the last block",
    ):
        assert line in result.out


def test_a_mean_that_is_only_rounding_is_zero(kd, everything, tmp_path):
    potential = Potential.load(everything / "teacher.safetensors")
    for mean, said in ((-1.97e-16, "energy mean 0 eV"), (-0.0, "energy mean 0 eV"), (2e-3, "mean 0.002 eV")):
        potential.scale = replace(potential.scale, energy_mean=mean)
        potential.save(tmp_path / "m.safetensors")
        assert said in kd("teacher", "info", tmp_path / "m.safetensors").out


@pytest.mark.parametrize("name", ["painn", "schnet", "gemnet_oc"])
def test_checkpoint_as_json(kd, name):
    path = checkpoint_path(name, "ocp2022_scale_dict_ddp")
    found = result_of(kd, "teacher", "info", path)
    assert found["config"]["name"] == name
    assert found["label_scale"]["energy_std"] == pytest.approx(2.887317180633545)
    assert found["neighbor_rule"]["cutoff"] == found["config"]["cutoff"]
    width = found["config"].get("hidden_channels", found["config"].get("emb_size_atom"))
    assert found["signals"]["node"]["shape"] == [width]
    assert set(found["signals"]) >= {"energy", "forces", "atomic_energies", "node"}
    trained = {
        k: v for k, v in read(name, "best_checkpoint")["state_dict"].items() if k.endswith(("weight", "bias"))
    }
    unique = sum(
        v.numel() for k, v in trained.items() if ".conv.nn." not in k and ".seq_energy_pre." not in k
    )
    assert found["n_parameters"] == unique + len(read(name, "ocp2022_scale_dict_ddp").get("scale_dict", {}))


@pytest.mark.parametrize("model", ["run", "teacher.safetensors", "ethanol.npz"])
def test_other_teachers(kd, everything, model):
    found = result_of(kd, "teacher", "info", everything / model)
    assert set(found["signals"]) >= {"energy", "forces", "node"}
    assert kd("teacher", "info", everything / model).out.startswith("teacher        ")


def test_a_checkpoint_without_factors_in_every_command(kd, refused, tmp_path):
    path = changed("painn", "ocp2022_scale_dict_ddp", strip_factors, tmp_path / "x.pt")
    data = tmp_path / "data.extxyz"
    ase.io.write(data, [as_atoms(s) for s in frames()[:6]])
    factors = tmp_path / "factors.json"
    scale_dict = read("painn", "ocp2022_scale_dict_ddp")["scale_dict"]
    factors.write_text(json.dumps({k: v.item() for k, v in scale_dict.items()}))
    store = tmp_path / "store.kdcache"
    for command in (
        ("teacher", "info", path),
        ("evaluate", path, data),
        ("cache-teacher", data, store, "--teacher", path),
    ):
        refused(*command, says=("x.pt", "scale factors are unknown", "--scale-file"))
        result = kd(*command, "--scale-file", factors, "--json")
        assert result.code == 0, result.err
    assert Cache.open(store).teachers["x"].provenance["scale_factors"] == str(factors)


def as_atoms(system):
    return ase.Atoms(system.atomic_numbers, system.positions, cell=system.cell, pbc=system.pbc)


def test_scale_factors_for_a_teacher_that_takes_none(refused, everything, tmp_path):
    (tmp_path / "f.json").write_text("{}")
    refused(
        "teacher", "info", everything / "run", "--scale-file", tmp_path / "f.json",
        says=("takes no scale factors",),
    )  # fmt: skip
