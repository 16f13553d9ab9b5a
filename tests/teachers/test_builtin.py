"""What a model trained here says of itself as a teacher."""

import pytest
import torch

from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.teachers.load import load_teacher

CONFIG = {"name": "schnet", "hidden_channels": 8, "num_filters": 8, "num_interactions": 1}
DATA = {"licence": "CC0-1.0", "citation": "coll-gfn2"}


@pytest.mark.parametrize(
    ("provenance", "licence", "citation"),
    [
        ({"data": DATA}, "licence of its training data: CC0-1.0", "coll-gfn2"),
        ({"data": DATA, "licence": "MIT", "citation": "A. Author"}, "MIT", "A. Author"),
        ({"data": None}, "", ""),
        ({}, "", ""),
    ],
)
def test_licence_and_citation_come_from_the_training_data(tmp_path, provenance, licence, citation):
    path = tmp_path / "teacher.safetensors"
    Potential(build_model(CONFIG), LabelScale(), {"model": CONFIG, "provenance": provenance}).save(path)
    info = load_teacher(str(path), device="cpu", dtype=torch.float32).info
    assert (info.licence, info.citation) == (licence, citation)
