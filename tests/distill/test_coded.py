"""Training from fitted encodings: what batches hold, and learning in the basis of the encoding."""

import numpy as np
import pytest
import torch
from distill_cases import (
    COLL,
    GEMNET_TEACHER,
    PAINN,
    add_teacher,
    column,
    make_store,
    save_teacher,
    train_config,
)

from molkd.cache_schema.codebook import decode_rows, encode_rows
from molkd.cache_schema.fields import node_spec, v2v_spec
from molkd.cache_schema.fitting import fit_codebook
from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.distill.coded import Coded, in_basis, ratios, rotated_bases
from molkd.pipeline.distill.heads import LinearHead
from molkd.pipeline.distill.loader import CacheLoader
from molkd.pipeline.distill.losses import feature_loss
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.graphs.neighbors import NeighborRule

SIGNALS = ("node", "v2v", "edge")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The same systems with the features of one GemNet-OC: exact, 8 bits, and rotated into few bytes."""
    folder = tmp_path_factory.mktemp("coded")
    teacher = save_teacher(folder / "teacher.safetensors", config=GEMNET_TEACHER)
    settings = {"signals": ("energy", "forces", *SIGNALS)}
    return {
        encoding: add_teacher(
            make_store(folder / f"{encoding}.kdcache".replace(":", "-"), COLL),
            teacher,
            **settings,
            encoding=encoding,
        )
        for encoding in ("fp32", "int8", "pca:6")
    }


def loader_of(store, **changes):
    values = {"batch_size": 7, "seed": 0, "teacher": "teacher", "signals": ("node", "v2v")}
    everything = np.ones(48, dtype=bool)
    scale = LabelScale(0.0, 1.0, 1.0, {})
    return CacheLoader(Cache.open(store), everything, NeighborRule(4.0, 50), scale, **(values | changes))


@pytest.mark.parametrize("encoding", ["int8", "pca:6"])
def test_batches_hold_the_decoded_values(stores, encoding):
    loader = loader_of(stores[encoding], signals=SIGNALS)
    with Cache.open(stores[encoding]) as cache:
        ids = {tuple(x): i for i, x in enumerate(cache.read(np.arange(48), ("energy",))["energy"][:, None])}
        samples = iter(loader)
        sample = next(samples)
        energies = sample.targets.energy.numpy()
        known = np.array([e for (e,) in ids])
        order = [int(np.abs(known.astype(np.float32) - e).argmin()) for e in energies]
        read = cache.read(order, (), "teacher", SIGNALS)
        samples.close()
    for name in ("node", "v2v"):
        np.testing.assert_allclose(sample.targets.teacher[name], read[f"teacher/{name}"], atol=1e-5)
    ours, theirs = (np.sort(x, axis=0) for x in (sample.targets.teacher["edge"], read["teacher/edge"]))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # the loader sorts edges


def test_codes_cross_to_a_device_as_they_are():
    rows = np.random.default_rng(0).normal(size=(9, 3, 8)).astype(np.float32)
    book = fit_codebook(rows, v2v_spec(8), "pca:4", 2)
    codes, scale = encode_rows(rows, book)
    coded = Coded(torch.from_numpy(codes), torch.from_numpy(scale), book, rotate=True)
    moved = []
    there = coded.map(lambda t: moved.append(t.dtype) or t)
    assert moved == [torch.uint8, torch.float16]
    np.testing.assert_allclose(there.decode(), decode_rows(codes, scale, book), atol=1e-6)


@pytest.mark.parametrize("vectors", [False, True])
def test_the_loss_in_the_basis_is_that_of_the_decoded_values_up_to_a_constant(vectors):
    """Against decoded targets the same number; against the exact ones the same plus what was cut off."""
    rng = np.random.default_rng(2)
    C, spec = 12, v2v_spec(12) if vectors else node_spec(12)
    shape = (400, 3, C) if vectors else (400, C)
    exact = (rng.normal(size=shape) @ (rng.normal(size=(C, C)) * np.exp(-np.arange(C)))).astype(np.float32)
    book = fit_codebook(exact, spec, "pca:10", 3)
    assert len(book.step) < C
    codes, scale = encode_rows(exact, book)
    components = torch.from_numpy(decode_rows(codes, scale, book, rotate=False))
    values = torch.from_numpy(decode_rows(codes, scale, book))
    student = torch.from_numpy(rng.normal(size=(*shape[:-1], 5)).astype(np.float32))
    small = LinearHead(5, len(book.step), bias=not vectors)
    wide = LinearHead(5, C, bias=not vectors)
    basis = torch.from_numpy(book.basis)
    with torch.no_grad():
        wide.linear.weight.copy_(basis.T @ small.linear.weight)
        if not vectors:
            wide.linear.bias.copy_(small.linear.bias @ basis + torch.from_numpy(book.mean))
        rotated = feature_loss(small(student), components, "mse") * ratios({"x": book})["x"]
        decoded = feature_loss(wide(student), values, "mse")
        truth = feature_loss(wide(student), torch.from_numpy(exact), "mse")
        floor = feature_loss(values, torch.from_numpy(exact), "mse")
    assert float(rotated) == pytest.approx(float(decoded), rel=1e-5)
    assert float(truth) == pytest.approx(float(decoded + floor), rel=0.02)


def test_shapes_in_the_basis(stores):
    with Cache.open(stores["pca:6"]) as cache:
        config = train_config(stores["pca:6"], stores["pca:6"] / "run", kd=[{"name": "n2n"}, {"name": "v2v"}])
        rotated = rotated_bases(cache, "teacher", config.kd)
        specs = {n: s.spec for n, s in cache.teachers["teacher"].signals.items()}
    assert set(rotated) == {"node", "v2v"}
    k = {name: len(book.step) for name, book in rotated.items()}
    assert in_basis(specs, rotated)["node"].shape == (k["node"],)
    assert in_basis(specs, rotated)["v2v"].shape == (3, k["v2v"])
    assert in_basis(specs, rotated)["energy"] == specs["energy"]


@pytest.mark.parametrize(
    ("encoding", "term", "message"),
    [
        ("pca:6", {"name": "n2n", "head": "mlp"}, "needs a linear head and the MSE, this term has head mlp"),
        ("pca:6", {"name": "n2n", "loss": "mae"}, "head linear and loss mae"),
        ("int8", {"name": "n2n"}, "no loss on features of atoms reads a signal stored as pca"),
        ("pca:6", {"name": "vanilla1"}, "no loss on features of atoms reads a signal stored as pca"),
    ],
)
def test_where_there_is_no_basis_to_learn_in(stores, tmp_path, encoding, term, message):
    config = train_config(stores[encoding], tmp_path / "run", kd=[term], rotated_targets=True)
    with pytest.raises(ConfigError, match=message):
        train_student(config)


def test_edges_are_learnt_decoded_beside_rotated_features(stores, tmp_path):
    """Edges are put in the student's order on the host; their head has the teacher's channels."""
    kd = [{"name": "n2n"}, {"name": "e2e"}]
    model = PAINN | {"cutoff": 5.0}
    out = tmp_path / "run"
    config = train_config(
        stores["pca:6"], out, kd=kd, model=model, rotated_targets=True, training={"max_steps": 3}
    )
    train_student(config)
    assert len(column(out, "train_e2e")) == 3
    assert np.isfinite(column(out, "train_e2e") + column(out, "train_n2n")).all()


@pytest.mark.parametrize("rotated", [False, True])
def test_a_student_learns_as_well(stores, tmp_path, rotated):
    """The same run from exact and from coded features: the loss falls as far, up to the encoding's floor."""
    kd = [{"name": "n2n", "weight": 20.0}]
    training = {"max_steps": 60}
    runs = {}
    for encoding in ("fp32", "pca:6"):
        out = tmp_path / encoding.replace(":", "-")
        config = train_config(
            stores[encoding], out, kd=kd, training=training, rotated_targets=rotated and encoding != "fp32"
        )
        train_student(config)
        runs[encoding] = column(out, "train_n2n")
    with Cache.open(stores["pca:6"]) as cache:
        floor = cache.teachers["teacher"].signals["node"].error_rms ** 2
    first, last = (np.mean(runs["fp32"][k]) for k in (slice(0, 3), slice(-6, None)))
    assert last < 0.7 * first
    assert np.mean(runs["pca:6"][-6:]) == pytest.approx(last, rel=0.15, abs=2 * floor)
