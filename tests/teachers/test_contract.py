"""What every teacher adapter promises, checked for all that can be loaded here."""

import json
import re
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import ase
import numpy as np
import pytest
import torch
from teacher_cases import ETHANOL_WEIGHTS, batch_of, random_schnetpack_arrays, structures

from molkd.pipeline.errors import TeacherError
from molkd.pipeline.teachers.load import load_teacher

# Float64, relative to the largest value of a signal. SevenNet keeps some constants of e3nn in float32, so its
# rotations hold to float32 only; a wrong axis or sign is off by 1.
TOLERANCE = {"sevennet-0": 1e-7}
EXACT = 1e-11
FORCE_STEP = 1e-4  # A; the error of central differences is about its square
FORCE_TOLERANCE = 1e-5  # of the largest force

TEACHERS = [
    "schnetpack-random",
    "schnetpack-ethanol",
    "painn-direct",
    "painn-gradient",
    "schnet",
    "ocp-painn",
    "ocp-gemnet_oc",
    "ocp-gemnet_oc-gradient",
    "sevennet-0",
]
GRADIENT = [name for name in TEACHERS if name not in ("painn-direct", "ocp-painn", "ocp-gemnet_oc")]


def write_builtin(name: str, path: Path) -> None:
    from molkd.pipeline.data.references import LabelScale
    from molkd.pipeline.models.potential import Potential
    from molkd.pipeline.models.registry import build_model

    config = {"name": "painn", "hidden_channels": 16, "num_layers": 2, "num_rbf": 8, "direct_forces": True}
    if name == "painn-gradient":
        config["direct_forces"] = False
    if name == "schnet":
        config = {"name": "schnet", "hidden_channels": 16, "num_filters": 16, "num_interactions": 2}
    torch.manual_seed(3)
    # No nearest-K cut: ties would let rounding decide which edges a rotated system keeps.
    model = build_model({**config, "cutoff": 5.0, "max_neighbors": 1000})
    for parameter in model.parameters():  # fresh biases are zero and hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    scale = LabelScale(
        energy_mean=-0.7, energy_std=1.9, forces_std=1.9, references={1: -13.0, 6: -1030.0, 8: -2040.0}
    )
    metadata = {
        "model": config | {"cutoff": 5.0, "max_neighbors": 1000},
        "provenance": {"elements": [1, 6, 8]},
    }
    Potential(model, scale, metadata).save(path)


def write_ocp(name: str, path: Path) -> None:
    """A checkpoint in the layout of 2023, of a small model with random weights."""
    from molkd.pipeline.models.registry import build_model

    sizes = {"hidden_channels": 16, "num_layers": 2, "num_rbf": 8}
    if "gemnet_oc" in name:
        sizes = {
            "num_spherical": 3,
            "num_radial": 8,
            "num_blocks": 2,
            "num_atom": 1,
            "num_output_afteratom": 1,
        }
        sizes |= {
            f"emb_size_{s}": n for s, n in (("atom", 12), ("edge", 10), ("rbf", 4), ("cbf", 5), ("sbf", 6))
        }
        sizes |= {f"emb_size_{s}_{d}": 4 for s in ("trip", "quad", "aint") for d in ("in", "out")}
        sizes |= {"num_before_skip": 1, "num_after_skip": 1, "num_concat": 1, "direct_forces": True}
        sizes |= {f"{s}_interaction": True for s in ("quad", "atom_edge", "edge_atom", "atom")}
        sizes |= {"sbf": {"name": "legendre_outer"}, "max_neighbors_aint": 1000}
    if "gradient" in name:
        sizes["direct_forces"] = False
    settings = {**sizes, "cutoff": 5.0, "max_neighbors": 1000}
    architecture = name.split("-")[1]
    torch.manual_seed(4)
    model = build_model({"name": architecture, **settings})
    for key, parameter in model.named_parameters():
        if key.endswith("scale_factor"):
            parameter.data.fill_(0.8)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    scales = {"mean": torch.tensor(-0.7), "std": torch.tensor(1.9)}
    content = {
        "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()},
        "config": {"model": architecture, "model_attributes": settings},
        "normalizers": {"target": scales, "grad_target": scales | {"mean": torch.tensor(0.0)}},
    }
    torch.save(content, path)


@cache
def teacher(name, dtype=torch.float64):
    if name == "sevennet-0":
        if find_spec("sevenn") is None:
            pytest.skip("the package sevenn is not installed (pip install 'molkd[sevenn]')")
        return load_teacher(name, device="cpu", dtype=dtype)
    if name == "schnetpack-ethanol":
        if not ETHANOL_WEIGHTS.exists():
            pytest.skip(f"no pretrained ethanol weights at {ETHANOL_WEIGHTS}")
        return load_teacher(str(ETHANOL_WEIGHTS / "painn_1.npz"), device="cpu", dtype=dtype)
    with TemporaryDirectory() as folder:
        if name == "schnetpack-random":
            path = Path(folder) / "random.npz"
            np.savez(path, **random_schnetpack_arrays())
        elif name.startswith("ocp-"):
            path = Path(folder) / f"{name}.pt"
            write_ocp(name, path)
        else:
            path = Path(folder) / f"{name}.safetensors"
            write_builtin(name, path)
        return load_teacher(str(path), device="cpu", dtype=dtype)


def compute(name, systems, dtype=torch.float64):
    t = teacher(name, dtype)
    return t.compute(batch_of(systems, t.neighbor_rule, dtype), list(t.signals))


def edge_names(signals):
    """What says which edges the rows of "edge" belong to."""
    return {"edge_index", "edge_shift"} if "edge" in signals else set()


def edge_order(index, shift):
    columns = np.concatenate([index.numpy(), shift.numpy().T])
    return torch.from_numpy(np.lexsort(columns))


def assert_close(found, expected, name, what):
    bound = TOLERANCE.get(name, EXACT) * max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max().item() <= bound, what


@pytest.mark.parametrize("name", TEACHERS)
def test_outputs_are_what_signals_declares(name):
    t = teacher(name, torch.float32)
    systems = structures()
    batch = batch_of(systems, t.neighbor_rule, torch.float32)
    with torch.no_grad():  # callers run a teacher without gradients, also one that takes forces from them
        out = t.compute(batch, list(t.signals))
    rows = {"system": len(systems), "atom": sum(map(len, systems))}
    if "edge" in t.signals:
        rows["edge"] = out["edge_index"].shape[1]
        assert tuple(out["edge_shift"].shape) == (rows["edge"], 3)
    assert set(out) == set(t.signals) | edge_names(t.signals)
    for key, spec in t.signals.items():
        assert key == spec.name
        assert tuple(out[key].shape) == (rows[spec.axis], *spec.shape), key
        assert out[key].dtype == getattr(torch, spec.dtype), key
        assert not out[key].requires_grad, key
        assert out[key].isfinite().all(), key
    assert not batch.positions.requires_grad


@pytest.mark.parametrize("name", TEACHERS)
def test_each_signal_alone_equals_all_at_once(name):
    t = teacher(name)
    batch = batch_of(structures(), t.neighbor_rule)
    everything = t.compute(batch, list(t.signals))
    for key in t.signals:
        alone = t.compute(batch, [key])
        assert set(alone) == {key} | edge_names([key])
        assert_close(alone[key], everything[key], name, key)


@pytest.mark.parametrize("name", TEACHERS)
def test_rotation_and_translation_keep_the_declared_symmetry(name):
    rng = np.random.default_rng(5)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotation *= np.linalg.det(rotation)  # a proper one
    systems = structures()
    turned = [atoms.copy() for atoms in systems]
    for atoms in turned:
        atoms.positions = atoms.positions @ rotation.T + [0.3, -1.1, 2.0]
        atoms.cell = atoms.cell.array @ rotation.T
    before, after = compute(name, systems), compute(name, turned)
    matrix = torch.from_numpy(rotation)
    for key, spec in teacher(name).signals.items():
        expected = before[key]
        if spec.symmetry == "vector":
            expected = torch.einsum("xy,ny...->nx...", matrix, expected)
        assert_close(after[key], expected, name, key)


@pytest.mark.parametrize("name", TEACHERS)
def test_order_of_atoms_only_orders_the_rows(name):
    systems = structures()
    rng = np.random.default_rng(6)
    orders = [rng.permutation(len(atoms)) for atoms in systems]
    offsets = np.cumsum([0] + [len(atoms) for atoms in systems[:-1]])
    rows = np.concatenate([order + offset for order, offset in zip(orders, offsets, strict=True)])
    before = compute(name, systems)
    after = compute(name, [atoms[order] for atoms, order in zip(systems, orders, strict=True)])
    for key, spec in teacher(name).signals.items():
        expected, found = before[key], after[key]
        if spec.axis == "atom":
            expected = expected[rows]
        elif spec.axis == "edge":  # the same edges by atoms and image, in any order
            numbers = torch.from_numpy(rows)[after["edge_index"]]
            expected = expected[edge_order(before["edge_index"], before["edge_shift"])]
            found = found[edge_order(numbers, after["edge_shift"])]
        assert_close(found, expected, name, key)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_system_does_not_see_its_batch(name):
    systems = structures()
    together = compute(name, systems)
    apart = [compute(name, [atoms]) for atoms in systems]
    for key in teacher(name).signals:
        assert_close(torch.cat([out[key] for out in apart]), together[key], name, key)


@pytest.mark.parametrize("name", TEACHERS)
def test_an_atom_moved_by_a_lattice_vector_changes_nothing(name):
    cell = structures()[2]
    image = cell.copy()
    image.positions[1] += cell.cell.array[0] - 2 * cell.cell.array[2]
    before, after = compute(name, [cell]), compute(name, [image])
    for key in teacher(name).signals:
        assert_close(after[key], before[key], name, key)


@pytest.mark.parametrize("name", TEACHERS)
def test_atomic_energies_sum_to_the_energy(name):
    systems = structures()
    out = compute(name, systems)
    parts = out["atomic_energies"].split([len(atoms) for atoms in systems])
    torch.testing.assert_close(torch.stack([p.sum() for p in parts]), out["energy"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", GRADIENT)
def test_forces_are_minus_the_slope_of_the_energy(name):
    systems = structures()
    forces = compute(name, systems)["forces"].numpy()
    first_atom = np.cumsum([0] + [len(atoms) for atoms in systems[:-1]])
    direction = np.random.default_rng(7).normal(size=forces.shape)
    energies = []
    for sign in (1, -1):
        moved = [atoms.copy() for atoms in systems]
        for atoms, row in zip(moved, first_atom, strict=True):
            atoms.positions += sign * FORCE_STEP * direction[row : row + len(atoms)]
        energies.append(compute(name, moved)["energy"].numpy())
    slope = (energies[0] - energies[1]) / (2 * FORCE_STEP)
    expected = -np.add.reduceat((forces * direction).sum(1), first_atom)
    scale = max(1.0, np.abs(forces).max())
    np.testing.assert_allclose(slope, expected, atol=FORCE_TOLERANCE * scale, rtol=0)


@pytest.mark.parametrize("name", TEACHERS)
def test_one_atom_and_atoms_out_of_reach(name):
    atom = ase.Atoms("O", positions=[[0.0, 0.0, 0.0]])
    far = ase.Atoms("OO", positions=[[0.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    alone, pair = compute(name, [atom]), compute(name, [far])
    assert_close(pair["node"], alone["node"].expand(2, -1), name, "node")
    for out in (alone, pair):
        assert not out["forces"].any()
        assert all(value.isfinite().all() for value in out.values())
    if "v2v" in alone:  # nothing around the atom, so no direction
        assert not alone["v2v"].any()


@pytest.mark.parametrize("name", TEACHERS)
def test_provenance_is_complete_and_json(name):
    t = teacher(name)
    info = json.loads(json.dumps(asdict(t.info)))
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", info["name"])
    assert re.fullmatch(r"[0-9a-f]{64}", info["weights_sha256"])
    assert info["energy_reference"]
    assert set(info["taps"]) == set(t.signals) - {"energy", "forces"}
    assert t.atomic_numbers >= {1, 6, 8}
    assert t.neighbor_rule.cutoff == 5.0


@pytest.mark.parametrize("name", TEACHERS)
def test_a_signal_it_does_not_give_is_refused_by_name(name):
    t = teacher(name)
    batch = batch_of(structures(), t.neighbor_rule)
    with pytest.raises(TeacherError, match=r"does not give charges; it gives .*atomic_energies"):
        t.compute(batch, ["node", "charges"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["schnetpack-ethanol", "sevennet-0"])
def test_cuda_gives_what_the_cpu_gives(name):
    spec = name if name == "sevennet-0" else str(ETHANOL_WEIGHTS / "painn_1.npz")
    expected = compute(name, structures())
    t = load_teacher(spec, device="cuda", dtype=torch.float64)
    out = t.compute(batch_of(structures(), t.neighbor_rule), list(t.signals))
    for key in t.signals:
        assert out[key].device.type == "cuda"
        assert_close(out[key].cpu(), expected[key], "sevennet-0", key)
