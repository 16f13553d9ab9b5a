"""What every model promises: symmetries, independence of the batch, forces, edge cases, precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from molkd.pipeline.data.system import System
from molkd.pipeline.graphs.batch import batch_from_systems, to_device
from molkd.pipeline.models.gemnet_oc.model import GemNetOC
from molkd.pipeline.models.interface import Model
from molkd.pipeline.models.registry import MODELS, build_model

_PAINN = {"name": "painn", "hidden_channels": 16, "num_layers": 2, "num_rbf": 8, "cutoff": 4.0}
_SCHNET = {"name": "schnet", "hidden_channels": 16, "num_filters": 12, "num_interactions": 2, "cutoff": 4.0}
_GEMNET = {
    "name": "gemnet_oc",
    "num_spherical": 3,
    "num_radial": 8,
    "num_blocks": 2,
    "emb_size_atom": 12,
    "emb_size_edge": 16,
    "emb_size_trip_in": 6,
    "emb_size_trip_out": 5,
    "emb_size_quad_in": 4,
    "emb_size_quad_out": 3,
    "emb_size_aint_in": 7,
    "emb_size_aint_out": 6,
    "emb_size_rbf": 5,
    "emb_size_cbf": 4,
    "emb_size_sbf": 5,
    "num_atom_emb_layers": 1,
    "cutoff": 4.0,
    "cutoff_aint": 4.5,
}
SMALL = {
    "gemnet-oc-direct": _GEMNET | {"max_neighbors": 10, "max_neighbors_qint": 4, "max_neighbors_aint": 100},
    "gemnet-oc-gradient": _GEMNET | {"direct_forces": False, "max_neighbors": 1000},
    "painn-direct": _PAINN | {"max_neighbors": 12},
    "painn-gradient": _PAINN | {"direct_forces": False},
    "schnet": _SCHNET | {"num_gaussians": 10},
}
ROUNDING = 1e-9  # of float64 sums in another order, after a few layers
FLOAT32 = 2e-5  # relative; a few hundred float32 roundings
FINITE_DIFFERENCE = 1e-6  # relative; central differences with steps of 1e-4 A leave about 1e-8


def make_system(seed, n_atoms=7, periodic=False):
    """Atoms at least 0.8 A apart, in a skewed box periodic in two directions or in open space."""
    rng = np.random.default_rng(seed)
    cell = np.array([[5.0, 0.3, 0.0], [-0.4, 4.6, 0.2], [0.1, 0.5, 9.0]])
    while True:
        positions = rng.random((n_atoms, 3)) @ np.diag([4.0, 4.0, 3.5])
        gaps = np.linalg.norm(positions[:, None] - positions[None], axis=2) + 9 * np.eye(n_atoms)
        if gaps.min() > 0.8:
            break
    return System(
        atomic_numbers=rng.choice([1, 6, 8, 29], n_atoms).astype(np.uint8),
        positions=positions,
        cell=cell if periodic else np.zeros((3, 3)),
        pbc=np.array([periodic, periodic, False]),
        energy=float("nan"),
        forces=np.full((n_atoms, 3), np.nan),
        tags=np.zeros(n_atoms, np.uint8),
        fixed=np.zeros(n_atoms, bool),
        source=f"random#{seed}",
    )


@pytest.fixture(params=[False, True], ids=["molecules", "periodic"])
def periodic(request):
    return request.param


@pytest.fixture(params=list(SMALL))
def model(request, periodic):
    torch.manual_seed(5)
    built = build_model(SMALL[request.param] | {"use_pbc": periodic}).double().eval()
    with torch.no_grad():  # biases start at zero, which would hide mistakes
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def on_request(model):
    """All signals but those of edges, whose order and number depend on the atoms' numbering."""
    return [name for name, spec in model.signals.items() if spec.axis != "edge"]


def run(model, systems, dtype=torch.float64, taps=None):
    taps = on_request(model) if taps is None else taps
    return model(batch_from_systems(systems, model.neighbor_rule, dtype), taps)


def assert_same(outputs, expected, transform=None, order=None, tolerance=ROUNDING, specs=None):
    """Compare all signals; those that `specs` calls vectors after `transform` (3, 3), atoms in `order`."""
    assert outputs.keys() == expected.keys()
    for name, value in outputs.items():
        reference = expected[name]
        if transform is not None and specs[name].symmetry == "vector":
            reference = torch.einsum("xy,ny...->nx...", torch.from_numpy(transform), reference)
        if order is not None and name != "energy":
            reference = reference[order]
        assert value.shape == reference.shape, name
        difference = (value - reference).abs().max()
        assert difference <= tolerance * (1 + reference.abs().max()), name


def test_every_architecture_is_covered(model):
    assert {config["name"] for config in SMALL.values()} == set(MODELS)
    assert isinstance(model, Model)


def test_outputs_are_what_signals_declares(model, periodic):
    systems = [make_system(1, 5, periodic), make_system(2, 7, periodic)]
    outputs = run(model, systems, taps=model.signals)
    edges = {"edge_index", "edge_shift"} if "edge" in model.signals else set()
    assert outputs.keys() == model.signals.keys() | edges
    n_edges = outputs["edge_index"].shape[1] if edges else 0
    for name, spec in model.signals.items():
        rows = {"system": 2, "atom": 12, "edge": n_edges}[spec.axis]
        assert outputs[name].shape == (rows, *spec.shape), name
    sums = torch.stack([part.sum() for part in outputs["atomic_energies"].split([5, 7])])
    torch.testing.assert_close(outputs["energy"], sums)
    assert not any(name.startswith("layer/") for name in run(model, systems, taps=()))


@pytest.mark.parametrize("determinant", [1, -1])
def test_rotation_and_reflection(model, periodic, determinant):
    system = make_system(3, periodic=periodic)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    rotation = rotation * np.sign(np.linalg.det(rotation)) * determinant
    turned = replace(system, positions=system.positions @ rotation.T, cell=system.cell @ rotation.T)
    assert_same(run(model, [turned]), run(model, [system]), transform=rotation, specs=model.signals)


def test_translation(model, periodic):
    system = make_system(4, periodic=periodic)
    moved = replace(system, positions=system.positions + np.array([3.1, -20.7, 0.4]))
    assert_same(run(model, [moved]), run(model, [system]))


def test_permutation_of_atoms(model, periodic):
    """Holds without a K-nearest cut only: when symmetrised, the atom with the higher index decides a pair."""
    system = make_system(6, 6, periodic)
    model.neighbor_rule = replace(model.neighbor_rule, max_neighbors=None)
    if isinstance(model, GemNetOC):  # takes further graphs from that one
        no_limit = dict.fromkeys(["max_neighbors", "max_neighbors_qint", "max_neighbors_aint"], 10_000)
        model.config = model.config.model_copy(update=no_limit)
    order = np.random.default_rng(1).permutation(6)
    fields = ("atomic_numbers", "positions", "forces", "tags", "fixed")
    shuffled = replace(system, **{name: getattr(system, name)[order] for name in fields})
    assert_same(run(model, [shuffled]), run(model, [system]), order=torch.from_numpy(order))


def test_other_periodic_images_of_single_atoms(model, periodic):
    if not periodic:
        pytest.skip("needs a cell")
    system = make_system(7, periodic=True)
    moves = np.random.default_rng(2).integers(-2, 3, size=(7, 3)) * system.pbc
    moved = replace(system, positions=system.positions + moves @ system.cell)
    assert_same(run(model, [moved]), run(model, [system]))


def test_systems_of_a_batch_do_not_see_each_other(model, periodic):
    systems = [make_system(8, 4, periodic), make_system(9, 1, periodic), make_system(10, 7, periodic)]
    together, alone = run(model, systems), [run(model, [system]) for system in systems]
    expected = {name: torch.cat([part[name] for part in alone]) for name in together}
    assert_same(together, expected)


def test_gradient_forces_are_the_numerical_derivative(model, periodic):
    if model.forces_from == "direct":
        pytest.skip("direct forces are no derivative")
    system, step = make_system(11, 5, periodic), 1e-4
    forces = run(model, [system])["forces"]
    moved = []
    for atom, axis, sign in np.ndindex(5, 3, 2):
        positions = system.positions.copy()
        positions[atom, axis] += (1 - 2 * sign) * step
        moved.append(replace(system, positions=positions))
    energies = run(model, moved)["energy"].view(5, 3, 2)
    numerical = (energies[..., 1] - energies[..., 0]) / (2 * step)
    assert (forces - numerical).abs().max() < FINITE_DIFFERENCE * (1 + numerical.abs().max())
    torch.testing.assert_close(forces.sum(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_loss_on_forces_reaches_the_weights(model, periodic):
    """The derivative of a force loss along a random direction of all weights, against central differences."""
    system, step = make_system(12, 5, periodic), 1e-5
    generator = torch.Generator().manual_seed(3)
    weights = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in weights]

    def loss():
        outputs = run(model, [system], taps=())
        return outputs["forces"].square().sum() + outputs["energy"].sum()

    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    values = []
    with torch.no_grad():
        for move in (step, -2 * step):
            for parameter, d in zip(weights, direction, strict=True):
                parameter.add_(move * d)
            values.append(loss())
    numerical = (values[0] - values[1]) / (2 * step)
    assert abs(slope - numerical) < 1e-5 * (1 + abs(numerical))


@pytest.mark.parametrize("seed", [13, 14])
def test_single_atoms_and_atoms_far_apart_have_outputs(model, periodic, seed):
    system = make_system(seed, 1, periodic)
    far = replace(system, cell=np.eye(3) * 50 * periodic)
    pair = replace(make_system(seed, 2), positions=np.array([[0.0, 0, 0], [30.0, 0, 0]]))
    for systems in ([far], [far, pair]):
        outputs = run(model, systems)
        assert outputs["forces"].shape == (sum(s.n_atoms for s in systems), 3)
        assert all(torch.isfinite(value).all() for value in outputs.values())
        torch.testing.assert_close(outputs["forces"], torch.zeros_like(outputs["forces"]))


def test_float32_is_close_to_float64_and_stays_float32(model, periodic):
    system = make_system(15, periodic=periodic)
    exact = run(model, [system])
    single = run(model.float(), [system], torch.float32)
    assert {value.dtype for value in single.values()} == {torch.float32}
    assert_same({k: v.double() for k, v in single.items()}, exact, tolerance=FLOAT32)


def test_state_dict_round_trip(model, periodic):
    system = make_system(16, periodic=periodic)
    copy = build_model(model.config.model_dump()).double().eval()
    copy.load_state_dict(model.state_dict())
    for name, value in run(copy, [system]).items():
        assert torch.equal(value, run(model, [system])[name]), name
    assert copy.neighbor_rule == model.neighbor_rule


def test_bf16_autocast_is_finite_and_its_heads_keep_float32(model, periodic):
    model = model.float().train()
    batch = batch_from_systems([make_system(17, periodic=periodic)], model.neighbor_rule)
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(batch)
    assert {value.dtype for value in outputs.values()} == {torch.float32}
    for name in ("energy", "forces"):  # bf16 keeps 8 bits
        error = (outputs[name] - exact[name]).abs().max()
        assert error < 0.1 * (1 + exact[name].abs().max()), name
    (outputs["energy"].sum() + outputs["forces"].square().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_forces_under_no_grad_come_detached(model, periodic):
    batch = batch_from_systems([make_system(18, periodic=periodic)], model.neighbor_rule, torch.float64)
    expected = model(batch)
    with torch.no_grad():
        outputs = model(batch)
    assert not any(value.requires_grad for value in outputs.values())
    torch.testing.assert_close(outputs["forces"], expected["forces"].detach())
    assert expected["forces"].requires_grad
    assert not batch.positions.requires_grad


def test_energies_only(periodic):
    for config in SMALL.values():
        model = build_model(config | {"use_pbc": periodic, "regress_forces": False}).double()
        assert "forces" not in model.signals
        names = set(on_request(model))
        assert run(model, [make_system(19, periodic=periodic)]).keys() == names


@pytest.mark.gpu
def test_cuda_gives_the_same_without_waiting_for_the_device(model, periodic):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if isinstance(model, GemNetOC):
        pytest.skip("sizes of its graphs depend on the data: it waits a few times before its first block")
    systems = [make_system(20, periodic=periodic), make_system(21, 3, periodic)]
    expected = run(model, systems)
    batch = to_device(batch_from_systems(systems, model.neighbor_rule, torch.float64), torch.device("cuda"))
    model = model.cuda()
    taps = on_request(model)
    model(batch, taps)  # first calls may wait, for memory and libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = model(batch, taps)
        (outputs["energy"].sum() + outputs["forces"].square().sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(
        {k: v.detach().cpu() for k, v in outputs.items()}, {k: v.detach() for k, v in expected.items()}
    )
