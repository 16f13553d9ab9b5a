"""Learning from the cache is learning from the teacher: the loss curves of both agree."""

import logging

import numpy as np
import pytest
from distill_cases import COLL, MODELS, SIGNALS, add_teacher, column, make_store, train_config
from live_loop import live_loss_curves

from molkd.cache_schema.reader import Cache
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.models.potential import Potential

N_STEPS = 40  # seven epochs
# Largest relative difference of a loss in any step. Stage one sees other batches than training does, so that
# float32 sums differ in their last digit: 6e-7 was seen.
FLOAT32_CURVES = 5e-6
# Features rounded to 11 bits move their own loss by 6e-5 and the total by 8e-6, as seen.
FLOAT16_TERMS, FLOAT16_TOTAL = 5e-4, 1e-4

KD = [
    {"name": "n2n", "weight": 50.0},
    {"name": "v2v", "weight": 500.0},
    {"name": "vanilla1", "weight": 0.5},
    {"name": "vanilla2", "weight": 20.0},
]
CURVES = ("loss", *(term["name"] for term in KD))


def config_of(store, out, name="painn-direct"):
    # Forces by gradient make a sharper loss: with long steps the last digit's difference grows by the step.
    lr = 1e-3 if name == "painn-gradient" else 5e-3
    training = {"max_steps": N_STEPS, "ema_decay": None, "lr": lr}
    return train_config(store, out, kd=KD, model=MODELS[name], training=training, val_every=N_STEPS)


def curves_of(run):
    return {name: column(run, f"train_{name}") for name in CURVES}


def largest_difference(a, b) -> float:
    return float(np.max(np.abs(np.array(a) / np.array(b) - 1)))


@pytest.mark.parametrize("name", ["painn-direct", "painn-gradient"])
def test_the_cache_and_a_live_teacher_give_the_same_loss_curves(store, teacher_file, tmp_path, name):
    config = config_of(store, tmp_path, name)
    train_student(config)
    cached = curves_of(tmp_path)
    live = live_loss_curves(config, teacher_file, Potential.load(tmp_path).scale)
    for curve in CURVES:
        assert len(cached[curve]) == len(live[curve]) == N_STEPS
        assert min(cached[curve]) < 0.9 * cached[curve][0]  # a flat curve would prove nothing
        assert largest_difference(cached[curve], live[curve]) < FLOAT32_CURVES, curve


def test_half_precision_features_change_the_curves_by_a_stated_bound(
    store, teacher_file, tmp_path, record_property
):
    half = add_teacher(make_store(tmp_path / "half.kdcache", COLL), teacher_file, encoding="fp16")
    entries = Cache.open(half).teachers["teacher"].signals
    assert {name for name in SIGNALS if entries[name].encoding == "fp16"} == {"node", "v2v"}
    for out, source in (("half", half), ("full", store)):
        train_student(config_of(source, tmp_path / out))
    narrow, full = curves_of(tmp_path / "half"), curves_of(tmp_path / "full")
    differences = {name: largest_difference(narrow[name], full[name]) for name in CURVES}
    for name, difference in differences.items():
        record_property(f"fp16_{name}", difference)
        logging.getLogger("molkd").info("fp16 against fp32 signals, %s: %.1e at most", name, difference)
    assert 0 < differences["loss"] < FLOAT16_TOTAL
    assert FLOAT32_CURVES < max(differences.values()) < FLOAT16_TERMS
