"""Edges against the lists that fairchem 1.10 made for the model fixtures (tests/data/models)."""

import io
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from molkd.pipeline.graphs.neighbors import NeighborRule, neighbor_lists

FOLDER = Path(__file__).parents[1] / "data" / "models"
CASES = sorted([*FOLDER.glob("painn_a/case_*.pt.xz"), *FOLDER.glob("schnet_a/case_*.pt.xz")])


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}-{p.name.split('.')[0]}")
def test_edges_shifts_and_distances_are_the_peers(path):
    case = torch.load(io.BytesIO(lzma.decompress(path.read_bytes())), weights_only=True)
    inputs, config, raw = case["inputs"], case["model_config"], case["intermediates"]
    rule = NeighborRule(config["cutoff"], config.get("max_neighbors", 50), use_pbc=config["use_pbc"])
    positions, cells = inputs["pos"].numpy(), inputs["cell"].numpy()
    atoms_ptr = np.append(0, np.cumsum(inputs["natoms"].numpy()))
    edge_index, shifts = neighbor_lists(positions, atoms_ptr, cells, inputs["pbc"].numpy(), rule)

    expected = np.concatenate([raw["raw.edge_index"].numpy()[::-1], raw["raw.cell_offsets"].numpy().T]).T
    if not rule.use_pbc:  # the search tree's order inside a receiver is arbitrary
        expected = expected[np.lexsort(expected.T[::-1])]
    np.testing.assert_array_equal(np.concatenate([edge_index[::-1], shifts.T]).T, expected)

    sender, receiver = edge_index
    offset = np.einsum("ek,ekx->ex", shifts, cells[inputs["batch"].numpy()[receiver]])
    distance = np.linalg.norm(positions[sender] + offset - positions[receiver], axis=1)
    order = slice(None) if rule.use_pbc else np.lexsort(raw["raw.edge_index"].numpy())
    np.testing.assert_allclose(distance, raw["raw.edge_distance"].numpy()[order], rtol=1e-12)
