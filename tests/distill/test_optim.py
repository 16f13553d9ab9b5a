"""Schedules at steps worked out by hand, the moving average against a plain loop."""

import math

import pytest
import torch
from torch import nn

from molkd.pipeline.config import ScheduleConfig, TrainingConfig, make_config
from molkd.pipeline.distill.optim import count_plateaus, lr_factor, make_ema, make_optimizer, update_ema
from molkd.pipeline.models.registry import load_preset


def training_of(preset: str) -> TrainingConfig:
    return make_config(TrainingConfig, load_preset(preset, periodic="oc20" in preset)["training"])


@pytest.mark.parametrize("preset", ["painn-big-coll", "painn-small-coll", "schnet-coll"])
def test_coll_warms_up_for_3750_steps_and_decays_to_a_hundredth_in_4_million(preset):
    training = training_of(preset)
    assert training.lr == 1e-3

    def at(step):
        return lr_factor(training.schedule, step, total_steps=1_875_000)

    assert at(0) == pytest.approx(0.2)
    assert at(1875) == pytest.approx(0.6 * 0.99784361, rel=1e-7)  # 0.01 ** (1875 / 4e6)
    assert at(3750) == pytest.approx(0.99569187, rel=1e-7)
    assert at(2_000_000) == pytest.approx(0.1)
    assert at(4_000_000) == pytest.approx(0.01)


@pytest.mark.parametrize("preset", ["painn-big-oc20", "painn-small-oc20"])
def test_painn_on_oc20_steps_down_four_times_without_warm_up(preset):
    training = training_of(preset)
    assert training.lr == 1e-4
    steps = [0, 159_999, 160_000, 320_000, 479_999, 480_000, 640_000, 5_000_000]
    expected = [1, 1, 0.45, 0.2025, 0.2025, 0.091125, 0.04100625, 0.04100625]
    assert [lr_factor(training.schedule, s, 0) for s in steps] == pytest.approx(expected)


def test_schnet_on_oc20_warms_up_then_divides_by_ten_three_times():
    schedule = training_of("schnet-oc20").schedule
    steps = [0, 15_625, 31_250, 52_082, 52_083, 83_333, 104_166, 312_480]
    expected = [0.2, 0.6, 1, 1, 0.1, 0.01, 0.001, 0.001]
    assert [lr_factor(schedule, s, 0) for s in steps] == pytest.approx(expected)


def test_without_decay_steps_the_decay_spans_the_run():
    schedule = ScheduleConfig(decay_rate=0.25)
    assert [lr_factor(schedule, s, 200) for s in (0, 100, 200)] == pytest.approx([1, 0.5, 0.25])


def test_a_constant_rate_still_warms_up():
    schedule = ScheduleConfig(kind="constant", warmup_steps=10, warmup_factor=0.5)
    assert [lr_factor(schedule, s, 100) for s in (0, 5, 10, 99)] == pytest.approx([0.5, 0.75, 1, 1])


@pytest.mark.parametrize("preset", ["gemnet-oc-oc20", "gemnet-oc-small-oc20"])
def test_gemnet_oc_on_oc20_drops_at_plateaus_as_torch_does(preset):
    """Against torch's own scheduler, over scores that improve, stall and get worse."""
    training = training_of(preset)
    assert training.lr == 5e-4
    scores = [5, 4, 4, 4.5, 4, 4.2, 3, 3, 3, 3, 2.9, 9, 9, 9, 9, 9, 9, 9, 9, 9]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.8, patience=3)
    best, n_stale, n_plateaus = math.inf, 0, 0
    for score in scores:
        n_stale, n_plateaus = count_plateaus(
            n_stale, n_plateaus, is_best=score < best, patience=training.schedule.patience
        )
        best = min(best, score)
        peer.step(score)
        assert lr_factor(training.schedule, 1, 0, n_plateaus) == pytest.approx(peer.get_last_lr()[0])
    assert n_plateaus == 3


def test_moving_average_is_a_plain_loop_with_a_young_phase():
    """The decay is min(0.5, (1 + n) / (10 + n)), 0.5 from n = 8 on; it starts from the first weights."""
    model = nn.Linear(2, 3)
    torch.nn.init.constant_(model.weight, 7.0)
    ema = make_ema(model)
    expected = 7.0
    for step in range(14):
        with torch.no_grad():
            model.weight.copy_(torch.full((3, 2), float(step**2)))
        update_ema(ema, model, step, 0.5)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step**2
        torch.testing.assert_close(ema.weight, torch.full((3, 2), expected))
    assert model.weight[0, 0].item() == 169.0  # the raw weights are left alone


def test_frozen_parameters_stay_out_of_the_optimizer():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    config = TrainingConfig(lr=0.01, weight_decay=2e-6, adam_eps=1e-7, amsgrad=True)
    (group,) = make_optimizer(model.parameters(), config).param_groups
    assert group["params"] == [model.weight]
    assert {k: group[k] for k in ("lr", "weight_decay", "eps", "amsgrad")} == {
        "lr": 0.01,
        "weight_decay": 2e-6,
        "eps": 1e-7,
        "amsgrad": True,
    }
