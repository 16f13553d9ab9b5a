"""GemNet-OC against fairchem 1.10 inside and out, and what its graphs must not depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import fcc111
from ocp_reference import CASES, FLOAT64, batch_of, edge_order, load_case, load_model, relative_error

from molkd.pipeline.data.system import System
from molkd.pipeline.graphs.batch import batch_from_systems
from molkd.pipeline.models.gemnet_oc.graphs import _warn_of_tags, build_graphs, table_of
from molkd.pipeline.models.gemnet_oc.quadruplets import quad_geometry
from molkd.pipeline.models.gemnet_oc.triplets import meeting_edges
from molkd.pipeline.models.registry import build_model, load_preset

GEMNET_CASES = [case for case in CASES if case[0].startswith("gemnet")]
INTERACTIONS = (
    "trip_interaction",
    "quad_interaction",
    "atom_edge_interaction",
    "edge_atom_interaction",
    "atom_interaction",
)


def order_of(graph):
    return edge_order(
        torch.stack([graph.sender, graph.receiver]), *(graph.distance.unsqueeze(1) * graph.vector).T
    )


def reference_order(expected):
    vectors = expected["main.distance"].unsqueeze(1) * expected["main.vector"]
    return edge_order(expected["main.edge_index"], *vectors.T)


def run_with_hooks(model, batch):
    """Outputs and, under the fixtures' names, what happens inside."""
    seen = {}

    def keep(name, module, pick=lambda result: result):
        module.register_forward_hook(lambda _module, _args, result: seen.__setitem__(name, pick(result)))

    keep("m_embed", model.edge_emb)
    for name in INTERACTIONS:
        keep(f"int0.{name}", getattr(model.int_blocks[0], name))
    for i, block in enumerate(model.int_blocks):
        keep(f"int{i}.h", block, lambda result: result[0])
        keep(f"int{i}.m", block, lambda result: result[1])
    for i, block in enumerate(model.out_blocks):
        keep(f"out{i}.x_F", block.scale_rbf_F)
    keep("x_F", model.out_mlp_F)
    keep("edge_force", model.out_forces, lambda result: result.squeeze(1))
    outputs = model(batch, list(model.signals))
    seen |= {f"out{i}.x_E": outputs[f"layer/X{i}"] for i in range(len(model.out_blocks))}
    seen |= {
        "h_embed": outputs["layer/H0"],
        "x_E": outputs["node"],
        "per_atom_energy": outputs["atomic_energies"],
    }
    return outputs, seen


@pytest.mark.parametrize(("folder", "name"), GEMNET_CASES)
def test_float64_agrees_in_everything(folder, name):
    case = load_case(folder, name)
    model = load_model(folder, case["model_config"]).double()
    batch = batch_of(case["inputs"], model.neighbor_rule, torch.float64)
    outputs, seen = run_with_hooks(model, batch)
    expected = case["intermediates"]
    for key in ("energy", "forces"):
        assert relative_error(outputs[key], case["out_f64"][key]) < FLOAT64, key

    graph_keys = {key for key in expected if key.split(".")[0] in ("main", "a2a", "aeaint", "qint")}
    compared = {key for key in expected if key not in graph_keys and not key.startswith("n_")} - {"id_swap"}
    assert compared <= set(seen), compared - set(seen)
    if "main.edge_index" in expected:
        ours, theirs = order_of(build_graphs(batch, model.config).main), reference_order(expected)
    for key in sorted(compared):
        value, reference = seen[key], expected[key]
        assert value.shape == reference.shape, key
        if len(value) != batch.n_atoms:
            value, reference = value[ours], reference[theirs]
        assert relative_error(value, reference) < FLOAT64, key


@pytest.mark.parametrize(("folder", "name"), [case for case in GEMNET_CASES if case[0].endswith("_a")])
def test_graphs_are_the_peers(folder, name):
    case = load_case(folder, name)
    config = load_model(folder, case["model_config"]).config
    batch = batch_of(case["inputs"], config.neighbor_rule, torch.float64)
    graphs = build_graphs(batch, config)
    expected = case["intermediates"]
    ours, theirs = order_of(graphs.main), reference_order(expected)
    vectors = (graphs.main.vector[ours], expected["main.vector"][theirs])
    assert relative_error(*vectors) < FLOAT64
    partner = torch.empty_like(ours)  # what the mirror's place is called in the common order
    partner[ours] = torch.arange(len(ours))
    peers_partner = torch.empty_like(theirs)
    peers_partner[theirs] = torch.arange(len(theirs))
    assert torch.equal(partner[graphs.mirror[ours]], peers_partner[expected["id_swap"][theirs]])
    for key, graph in (("a2a", graphs.atom), ("aeaint", graphs.atom_edge), ("qint", graphs.quad)):
        edges = torch.cat([torch.stack([graph.sender, graph.receiver]), graph.shift.T])
        reference = torch.cat([expected[f"{key}.edge_index"], -expected[f"{key}.cell_offset"].T]).long()
        assert sorted(edges.T.tolist()) == sorted(reference.T.tolist()), key


@pytest.mark.parametrize(("folder", "name"), GEMNET_CASES)
def test_numbers_of_triplets_and_quadruplets_are_the_peers(folder, name):
    """Tables hold as many products as the peer lists, the rest being zero."""
    case = load_case(folder, name)
    config = load_model(folder, case["model_config"]).config
    batch = batch_of(case["inputs"], config.neighbor_rule, torch.float64)
    graphs, n_atoms = build_graphs(batch, config), batch.n_atoms
    main, near = ((g, table_of(g, n_atoms)) for g in (graphs.main, graphs.atom_edge))

    def n_products(outputs, inputs):
        is_pair = filled(outputs).unsqueeze(2) & filled(inputs).unsqueeze(1)
        return int((is_pair & (meeting_edges(outputs, inputs, 1)[:, :, 0] != 0)).sum())

    def filled(pair):
        graph, table = pair
        return table.spread(torch.ones(len(graph.sender))) > 0

    geometry = quad_geometry(graphs.main, graphs.quad, n_atoms, 1)
    d_filled = geometry.d_table.spread(torch.ones(len(geometry.d_edges)))[geometry.b_row] > 0
    d_counts = d_filled & (geometry.angle_abd[..., 0] != 0)  # (Q, Wd)
    has_edge = torch.zeros(geometry.n_places[0], dtype=torch.bool).index_fill(0, geometry.c_place, value=True)
    c_counts = (geometry.angle_cab[:, 0] != 0) & has_edge.unsqueeze(1)  # (R Wc, Wq)
    c_counts = c_counts.flatten()[geometry.place].view(len(d_counts), -1)  # (Q, Wc)
    quadruplets = c_counts.unsqueeze(2) & d_counts.unsqueeze(1) & (geometry.dihedral != 0)
    found = {
        "n_triplets_e2e": n_products(main, main),
        "n_triplets_a2e": n_products(main, near),
        "n_triplets_e2a": n_products(near, main),
        "n_triplets_quad_in": int(d_counts.sum()),
        "n_triplets_quad_out": int(c_counts.sum()),
        "n_quadruplets": int(quadruplets.sum()),
    }
    assert found == {key: int(case["intermediates"][key]) for key in found}


def slab(turn=0.0):
    """A perfect copper slab: neighbors at equal distances everywhere, and atoms on straight lines."""
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8.0)
    atoms.rotate(turn, (1, 2, 3), rotate_cell=True)
    return System(
        atomic_numbers=atoms.numbers.astype(np.uint8),
        positions=atoms.positions,
        cell=atoms.cell.array,
        pbc=np.array([True, True, True]),
        energy=float("nan"),
        forces=np.full((len(atoms), 3), np.nan),
        tags=(atoms.get_tags() == 1).astype(np.uint8),
        fixed=np.zeros(len(atoms), bool),
        source="slab",
    )


def small_model():
    torch.manual_seed(0)
    config = load_preset("gemnet-oc-tiny", periodic=True)["model"]
    return build_model(config | {"max_neighbors": 10, "max_neighbors_qint": 5}).eval()


def test_ties_in_a_crystal_do_not_depend_on_the_batch():
    """K falls between neighbors at one distance; float32 rounding must not choose among them."""
    model, crystal = small_model(), slab()
    other = replace(crystal, positions=crystal.positions * 1.01 + 7.3, cell=crystal.cell * 1.01)
    with torch.no_grad():
        alone = model(batch_from_systems([crystal], model.neighbor_rule))
        last = model(batch_from_systems([other, other, crystal], model.neighbor_rule))
    n = crystal.n_atoms
    torch.testing.assert_close(last["energy"][-1:], alone["energy"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last["forces"][-n:], alone["forces"], rtol=1e-4, atol=1e-5)


def test_a_crystal_in_single_precision_has_no_dihedral_noise():
    """Along straight rows of atoms a dihedral angle is not defined; rounding must not become a number."""
    model, crystal = small_model(), slab()
    with torch.no_grad():
        single = model(batch_from_systems([crystal], model.neighbor_rule))
        exact = model.double()(batch_from_systems([crystal], model.neighbor_rule, torch.float64))
    torch.testing.assert_close(single["energy"].double(), exact["energy"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("periodic", [True, False])
def test_without_quadruplets_the_rest_works_with_a_warning(periodic, caplog):
    """No atom has a tag of `qint_tags`, as in OC20's models on molecules."""
    torch.manual_seed(1)
    _warn_of_tags.cache_clear()
    config = load_preset("gemnet-oc-tiny", periodic=periodic)["model"] | {"qint_tags": [2]}
    model, system = build_model(config).double(), slab()
    outputs = model(batch_from_systems([system], model.neighbor_rule, torch.float64), list(model.signals))
    assert all(torch.isfinite(value).all() for value in outputs.values())
    tagged = replace(system, tags=np.full_like(system.tags, 2))
    assert caplog.text.count("qint_tags [2]") == 1
    assert "model.qint_tags=[0,1,2]" in caplog.text
    changed = model(batch_from_systems([tagged], model.neighbor_rule, torch.float64))
    assert (changed["energy"] - outputs["energy"]).abs() > 1e-6


def test_one_system_without_tags_among_others_is_enough_for_the_warning(caplog):
    """A system without edges has no quadruplets to lose."""
    model = build_model(load_preset("gemnet-oc-tiny", periodic=True)["model"] | {"qint_tags": [2]})
    bare = replace(slab(), tags=np.zeros_like(slab().tags))
    tagged = replace(bare, tags=np.arange(bare.n_atoms, dtype=np.uint8) // (bare.n_atoms - 1) * 2)
    first = {
        name: getattr(bare, name)[:1] for name in ("atomic_numbers", "positions", "tags", "forces", "fixed")
    }
    lone = replace(bare, pbc=np.array([False] * 3), **first)
    for systems, n_warnings in (([tagged, lone, tagged], 0), ([tagged, bare, lone], 1), ([bare], 1)):
        if not n_warnings:
            _warn_of_tags.cache_clear()
        build_graphs(batch_from_systems(systems, model.neighbor_rule), model.config)
        assert caplog.text.count("a system has no atom with a tag in qint_tags [2]") == n_warnings


def test_edge_signals_add_up_to_those_of_atoms():
    """Eqs. 5 and 6: e2n and v2v are sums over incoming edges."""
    torch.manual_seed(2)
    model = build_model(load_preset("gemnet-oc-tiny", periodic=True)["model"]).double()
    system = slab(turn=20.0)
    batch = batch_from_systems([system], model.neighbor_rule, torch.float64)
    outputs = model(batch, ["edge", "e2n", "v2v"])
    sender, receiver = outputs["edge_index"].numpy()
    shift = outputs["edge_shift"].numpy()
    from_sender = system.positions[receiver] - system.positions[sender] - shift @ system.cell
    unit = from_sender / np.linalg.norm(from_sender, axis=1, keepdims=True)
    edge = outputs["edge"].detach().numpy()
    e2n, v2v = np.zeros_like(outputs["e2n"].detach()), np.zeros_like(outputs["v2v"].detach())
    np.add.at(e2n, receiver, edge)
    np.add.at(v2v, receiver, unit[:, :, None] * edge[:, None, :])
    np.testing.assert_allclose(outputs["e2n"].detach(), e2n, atol=1e-10)
    np.testing.assert_allclose(outputs["v2v"].detach(), v2v, atol=1e-6)  # positions of a batch are float32
