"""The same for layers, edges and sums over edges: a GemNet-OC teaches every student, cached and live."""

import numpy as np
import pytest
from distill_cases import (
    GEMNET,
    MODELS,
    column,
    train_config,
)
from live_loop import live_loss_curves

from molkd.pipeline.config import parse_kd
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.models.potential import Potential

N_STEPS = 24  # four epochs
FLOAT32_CURVES = 1e-5  # relative; see test_equivalence
STUDENTS = {
    "painn, own edges": (MODELS["painn-direct"], ["n2n:H1->U1+U2=5", "e2n:M2=0.5", "v2v=50"]),
    "painn, the teacher's edges": (MODELS["painn-direct"] | {"cutoff": 5.0}, ["e2e=1", "n2n:U1=5", "v2v=50"]),
    "painn, layers of vectors": (MODELS["painn-direct"], ["v2v:UV1=50", "v2v:MV2+v2v=20", "v2v=10"]),
    "schnet": (MODELS["schnet"], ["n2n:X2->I1=5", "e2n=0.5", "vanilla2=10"]),
    "gemnet-oc": (GEMNET, ["e2e=1", "e2n:e2n=0.5", "n2n:H1->H2+X0=5", "v2v=50"]),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_the_cache_and_a_live_gemnet_give_the_same_loss_curves(gemnet_store, gemnet_file, tmp_path, name):
    model, kd = STUDENTS[name]
    training = {"max_steps": N_STEPS, "ema_decay": None, "lr": 2e-3}
    config = train_config(
        gemnet_store, tmp_path, kd=parse_kd(kd), model=model, training=training, val_every=N_STEPS
    )
    train_student(config)
    live = live_loss_curves(config, gemnet_file, Potential.load(tmp_path).scale)
    assert len(config.kd) == len({term.label for term in config.kd}) == len(kd)
    for curve in ("loss", *(term.label for term in config.kd)):
        cached = column(tmp_path, f"train_{curve}")
        assert len(cached) == len(live[curve]) == N_STEPS
        difference = np.abs(np.array(cached) / np.array(live[curve]) - 1).max()
        assert difference < FLOAT32_CURVES, curve
    assert column(tmp_path, "train_loss")[-1] < 0.9 * column(tmp_path, "train_loss")[0]
