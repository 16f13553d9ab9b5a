"""Reads the fixtures of tests/data/models and rebuilds the models that made them."""

import hashlib
import io
import json
import lzma
from pathlib import Path

import numpy as np
import torch

from molkd.pipeline.graphs.batch import make_batch
from molkd.pipeline.models.registry import build_model

FOLDER = Path(__file__).parents[1] / "data" / "models"
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
        seed = json.loads((FOLDER / folder / "config.json").read_text())["weight_recipe_seed"]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(drawn_weight(name, tuple(parameter.shape), seed)))
    return model


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
        fan_out, fan_in = shape
        if fan_in > 1:
            spread = np.sqrt(normal.var(axis=1, ddof=1, keepdims=True) + 1e-6)
            normal = (normal - normal.mean(axis=1, keepdims=True)) / spread
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
