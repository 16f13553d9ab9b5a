"""CKA with the teacher while a student trains: the right numbers, and no trace in what is trained."""

import numpy as np
import pytest
import torch
from distill_cases import (
    GEMNET,
    MODELS,
    PAINN,
    before_step,
    column,
    interrupt_after,
    read_metrics,
    train_config,
)

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.splits import split_mask
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.graphs.batch import batch_from_systems
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.similarity import cka

FLOAT32 = 2e-5
TERMS = [
    {"name": "n2n"},
    {"name": "v2v"},
    {"name": "n2n", "student_taps": ["U1", "node"]},
    {"name": "vanilla2"},
]
COLUMNS = ["cka_n2n", "cka_v2v", "cka_n2n:U1+node"]


class CrashError(Exception):
    """Stands for whatever ends a process."""


def config_of(store, out, **changes):
    return train_config(store, out, **({"kd": TERMS, "val_every": 4, "checkpoint_every": 5} | changes))


def expected(store, run, rows):
    """CKA of the last averaged weights on the systems at `rows`, all atoms at once."""
    potential, cache = Potential.load(run / "best.safetensors"), Cache.open(store)
    potential.model.load_state_dict(torch.load(run / "last.pt", weights_only=True)["ema"])
    source = StoreSource(cache)
    batch = batch_from_systems([source.read(int(i)) for i in rows], potential.neighbor_rule)
    with torch.no_grad():
        out = potential.predict(batch, ("layer/U1",), forces=False)
    signals = cache.read(rows, (), teacher="teacher", signals=("node", "v2v"))
    node, v2v = (torch.from_numpy(signals[f"teacher/{name}"]).double() for name in ("node", "v2v"))
    both = torch.cat([out["layer/U1"], out["node"]], dim=1)
    return [float(cka(x.double(), y)) for x, y in ((out["node"], node), (out["v2v"], v2v), (both, node))]


def flat(state, prefix=""):
    """All values of a checkpoint by their places, tensors as bytes, without the clock."""
    if isinstance(state, dict | list):
        parts = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for name, part in parts for k, v in flat(part, f"{prefix}.{name}").items()}
    value = state.numpy().tobytes() if isinstance(state, torch.Tensor) else state
    return {} if prefix.endswith(".seconds") else {prefix: value}


def last_row(run):
    return [float(read_metrics(run)[-1][name]) for name in COLUMNS]


def test_the_held_out_systems_are_compared(store, tmp_path):
    train_student(config_of(store, tmp_path / "run"))
    cache = Cache.open(store)
    rows = np.flatnonzero(split_mask(cache.ids, 0.1))
    assert 0 < len(rows) < 20
    assert last_row(tmp_path / "run") == pytest.approx(expected(store, tmp_path / "run", rows), abs=FLOAT32)
    metrics = read_metrics(tmp_path / "run")
    assert list(metrics[0])[-3:] == COLUMNS
    for row in metrics:  # where a row is of a validation, and only there
        assert [row[name] != "" for name in COLUMNS] == [row["val_force_cos"] != ""] * 3
    assert len(column(tmp_path / "run", "cka_n2n")) == 3


def test_without_held_out_systems_some_that_are_trained_on(store, tmp_path):
    config = config_of(store, tmp_path / "run", val_fraction=0, cka_systems=9)
    train_student(config)
    values = expected(store, tmp_path / "run", np.arange(9))
    assert last_row(tmp_path / "run") == pytest.approx(values, abs=FLOAT32)


@pytest.mark.parametrize("ema_decay", [0.9, None])
@pytest.mark.parametrize("model", ["painn", "schnet"])
def test_nothing_of_the_run_depends_on_it(store, tmp_path, ema_decay, model):
    """Weights, optimiser, place in the data and all other numbers: equal to the last bit."""
    terms = TERMS if model == "painn" else [{"name": "n2n"}]
    settings = {"kd": terms, "model": PAINN if model == "painn" else MODELS["schnet"]}
    settings["training"] = {"ema_decay": ema_decay}
    random: list[torch.Tensor] = []
    for n in (0, 40):
        torch.manual_seed(3)
        train_student(config_of(store, tmp_path / str(n), cka_systems=n, **settings))
        random.append(torch.random.get_rng_state())
    assert torch.equal(*random)
    off, on = tmp_path / "0", tmp_path / "40"
    assert (off / "best.safetensors").read_bytes() == (on / "best.safetensors").read_bytes()
    states = [flat(torch.load(run / "last.pt", weights_only=True)) for run in (off, on)]
    assert states[0] == states[1]
    assert len(states[0]) > 100
    for a, b in zip(read_metrics(off), read_metrics(on), strict=True):
        for name in a:
            if name.startswith("cka_"):
                assert a[name] == ""
            elif name != "seconds":
                assert a[name] == b[name], name
    assert len(column(on, "cka_n2n")) == 3


def test_a_resumed_run_has_the_same_rows(store, tmp_path, monkeypatch):
    """It crashes in step 10, so that the validation at 8 is lost, and goes on from 5."""

    def crash():
        raise CrashError

    train_student(config_of(store, tmp_path / "whole"))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, 9, crash)
        with pytest.raises(CrashError):
            train_student(config_of(store, run))
    assert len(column(run, "cka_n2n")) == 2
    train_student(config_of(store, run))
    resumed, whole = read_metrics(run), read_metrics(tmp_path / "whole")
    for row in (*resumed, *whole):
        del row["seconds"]
    assert resumed == whole


def test_it_can_be_switched_while_a_run_goes_on(store, tmp_path, monkeypatch):
    """The columns stay, so that no row is lost or shifted."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert not train_student(config_of(store, run)).finished
    assert train_student(config_of(store, run, cka_systems=0)).finished
    rows = read_metrics(run)
    assert [int(r["step"]) for r in rows if r["cka_n2n"]] == [4]
    assert [int(r["step"]) for r in rows if r["val_force_cos"]] == [4, 8, 12]


def test_no_columns_without_features_to_compare(store, tmp_path):
    train_student(config_of(store, tmp_path / "run", kd=[{"name": "vanilla2"}]))
    assert not [name for name in read_metrics(tmp_path / "run")[0] if name.startswith("cka")]


def test_edges_of_a_teacher_are_left_alone(gemnet_store, tmp_path):
    """e2e trains on the teacher's edges; n2n beside it is compared on the student's own."""
    terms = [{"name": "e2n"}, {"name": "e2e"}]
    train_student(config_of(gemnet_store, tmp_path / "run", kd=terms, model=GEMNET))
    assert "cka_e2e" not in read_metrics(tmp_path / "run")[0]
    values = column(tmp_path / "run", "cka_e2n")
    assert len(values) == 3
    assert all(0 < v <= 1 + 1e-9 for v in values)
