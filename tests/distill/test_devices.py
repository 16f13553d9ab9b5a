"""The same run on CUDA and on the CPU."""

import numpy as np
import pytest
import torch
from distill_cases import (
    MODELS,
    add_teacher,
    column,
    interrupt_after,
    make_store,
    train_config,
    write_part,
)

from molkd.pipeline.config import TrainConfig, make_config
from molkd.pipeline.distill.train import train_student

# Relative difference of a loss after 12 steps: sums in another order, a few of 7 digits.
DEVICE_NOISE = 1e-3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def config_of(store, out, name, device):
    kd = [{"name": "n2n"}, {"name": "vanilla1"}, {"name": "vanilla2"}]
    kd += [{"name": "v2v"}] * (name != "schnet")
    return train_config(store, out, model=MODELS[name], kd=kd, device=device)


@pytest.mark.parametrize("name", MODELS)
def test_kd_on_cuda_follows_the_cpu(store, tmp_path, name):
    for device in ("cpu", "cuda"):
        assert train_student(config_of(store, tmp_path / device, name, device)).finished
    cpu, cuda = (column(tmp_path / device, "train_loss") for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cuda, cpu, rtol=DEVICE_NOISE)


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory, teacher_file):
    """Two halves of the data in encodings with codebooks of their own."""
    folder = tmp_path_factory.mktemp("mixed")
    halves = [write_part(folder / f"{k}.extxyz", *part) for k, part in enumerate([(0, 30), (30, 48)])]
    stores = [make_store(folder / f"{k}.kdcache", half) for k, half in enumerate(halves)]
    return [add_teacher(s, teacher_file, encoding=e) for s, e in zip(stores, ("int8", "pca:6"), strict=True)]


def test_several_stores_on_cuda_follow_the_cpu(two_stores, tmp_path):
    mix = [{"store": two_stores[1], "weight": 0.5}]
    for device in ("cpu", "cuda"):
        config = config_of(two_stores[0], tmp_path / device, "painn-direct", device)
        assert train_student(make_config(TrainConfig, config.model_dump(), {"mix": mix})).finished
    cpu, cuda = (column(tmp_path / device, "train_loss") for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cuda, cpu, rtol=DEVICE_NOISE)


def test_a_run_begun_on_cuda_continues_on_the_cpu(store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        train_student(config_of(store, tmp_path / "both", "painn-direct", "cuda"))
    assert train_student(config_of(store, tmp_path / "both", "painn-direct", "cpu")).finished
    train_student(config_of(store, tmp_path / "cpu", "painn-direct", "cpu"))
    both, cpu = (column(tmp_path / run, "train_loss") for run in ("both", "cpu"))
    np.testing.assert_allclose(both, cpu, rtol=DEVICE_NOISE)


def test_mixed_precision_on_cuda_learns(store, tmp_path):
    config = config_of(store, tmp_path, "painn-direct", "cuda").model_copy(update={"amp": "bf16"})
    assert train_student(config).finished
    assert np.isfinite(column(tmp_path, "train_loss")).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_waits_for_the_device(store, tmp_path, name):
    """Steps without a row of metrics.csv copy nothing back; checked by torch itself."""
    from molkd.pipeline.distill import train

    step = train.train_step

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", watched)
        assert train_student(config_of(store, tmp_path, name, "cuda")).finished
