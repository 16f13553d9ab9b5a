"""Reads the fixtures of tests/data/models and rebuilds the models that made them."""

import hashlib
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from molkd.pipeline.graphs.batch import make_batch
from molkd.pipeline.models.registry import build_model

FOLDER = Path(__file__).parents[1] / "data" / "models"
SHARED = Path(__file__).parents[3] / "shared" / "reference"
FLOAT64 = 1e-9  # relative to the largest value of an array; the reference holds about 1e-14
CASES = [
    (path.parent.name, path.name.removesuffix(".pt.xz")) for path in sorted(FOLDER.glob("*/case_*.pt.xz"))
]


def load_tensors(path):
    return torch.load(io.BytesIO(lzma.decompress(path.read_bytes())), weights_only=True)


def load_case(folder, case):
    return load_tensors(FOLDER / folder / f"{case}.pt.xz")


def load_model(folder, model_config):
    """Model of a case with the weights of its folder, float32."""
    settings = {k: v for k, v in model_config.items() if k != "otf_graph"}
    model = build_model(settings)
    stored = FOLDER / folder / "state_dict.pt.xz"
    if stored.exists():
        model.load_state_dict(load_tensors(stored))
    else:
        recipe = json.loads((FOLDER / folder / "config.json").read_text())
        override = scale_factors(recipe["scale_factors_override"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = drawn_weight(name, tuple(parameter.shape), recipe["weight_recipe_seed"])
                parameter.copy_(torch.from_numpy(value))
                if name.removesuffix(".scale_factor") in override:
                    parameter.fill_(override[name.removesuffix(".scale_factor")])
    return model


def scale_factors(path):
    """Factors of a published model, which may not be copied into this project."""
    if path is None:
        return {}
    path = SHARED / path
    if not path.exists():
        pytest.skip(f"published scale factors are not at {path}")
    return {name: float(np.squeeze(value)) for name, value in json.loads(path.read_text()).items()}


def drawn_weight(name, shape, seed):
    """Weight of that name: scaled normal numbers from a hash of seed and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    if name.endswith("scale_factor"):
        return np.full(shape, 0.8 + 0.8 * rng.random(), dtype=np.float32)
    normal = rng.standard_normal(shape)
    if name.endswith("bias"):
        value = 0.05 * normal
    elif name.endswith("layernorm.weight"):
        value = 1 + 0.1 * normal
    elif name.endswith(("embeddings.weight", "embedding.weight")):
        value = normal
    else:
        axes = (1,) if len(shape) == 2 else (0, 1)
        fan_out, fan_in = shape[0], int(np.prod([shape[axis] for axis in axes]))
        if fan_in > 1:
            spread = np.sqrt(normal.var(axis=axes, ddof=1, keepdims=True) + 1e-6)
            normal = (normal - normal.mean(axis=axes, keepdims=True)) / spread
        value = normal / np.sqrt(fan_in)
        if name.startswith(("message_layers.", "update_layers.")):
            value = value * np.sqrt(2 * fan_in / (fan_in + fan_out))
    if name == "out_forces.output_network.1.vec2_proj.weight":
        value = 2 * value
    return value.astype(np.float32)


def batch_of(inputs, rule, dtype):
    """Batch of a case's inputs, with edges by the rule."""
    return make_batch(
        atomic_numbers=inputs["Z"].numpy(),
        positions=inputs["pos"].numpy(),
        n_atoms=inputs["natoms"].numpy(),
        cell=inputs["cell"].numpy(),
        pbc=inputs["pbc"].numpy(),
        tags=inputs["tags"].numpy(),
        fixed=inputs["fixed"].numpy().astype(bool),
        rule=rule,
        dtype=dtype,
    )


def relative_error(value, expected):
    expected = expected.double()
    scale = max(float(expected.abs().max()), 1e-30)
    return float((value.detach().double() - expected).abs().max()) / scale


def edge_order(edge_index, *columns):
    """Order by receiver, sender and rounded per-edge quantities (images of one pair differ in those)."""
    keys = [np.round(np.asarray(c.detach(), dtype=np.float64), 5) + 0.0 for c in columns]
    return torch.from_numpy(np.lexsort([*keys[::-1], edge_index[0].numpy(), edge_index[1].numpy()]))
