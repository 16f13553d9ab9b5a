"""Lambda = auto, worked out by hand on a store of two molecules with signals that we write ourselves."""

import math

import numpy as np
import pytest
from distill_cases import make_store, train_config

from molkd.cache_schema.fields import (
    atomic_energies_spec,
    e2n_spec,
    edge_spec,
    energy_spec,
    forces_spec,
    node_spec,
    v2v_spec,
)
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.writer import Store
from molkd.pipeline.device import choose_device
from molkd.pipeline.distill.lambdas import zero_model_loss
from molkd.pipeline.distill.statistics import label_statistics
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.errors import CacheError, ConfigError

# Energies 1 and -3 eV: mean size 2. Forces 0.5 eV/A long on free atoms: L_0 = 1 * 2 + 100 * 0.5 = 52.
FRAMES = """2
Properties=species:S:1:pos:R:3:forces:R:3 energy=1.0 pbc="F F F"
H 0.0 0.0 0.0 0.5 0.0 0.0
H 0.0 0.0 0.8 0.0 0.3 0.4
3
Properties=species:S:1:pos:R:3:move_mask:L:1:forces:R:3 energy=-3.0 pbc="F F F"
H 0.0 0.0 0.0 T 0.0 -0.5 0.0
H 0.0 0.0 0.9 T -0.5 0.0 0.0
H 0.0 0.9 0.0 F 90.0 90.0 90.0
"""
L0 = 52.0
SHARE = 1 / (1 + math.exp(-1))  # softmax of 2 and 1
UNEVEN = math.log(2) + SHARE * math.log(SHARE) + (1 - SHARE) * math.log(1 - SHARE)  # against even shares


@pytest.fixture(scope="module")
def hand_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hand")
    (folder / "two.extxyz").write_text(FRAMES)
    path = make_store(folder / "two.kdcache", folder / "two.extxyz")
    rows = np.arange(5)[:, None]
    node = np.where(rows % 2 == 0, [[1.0, 5.0]], [[3.0, 5.0]]).astype(np.float32)  # variances 0.96 and 0
    v2v = np.tile(np.array([[2.0], [-2.0], [0.0]], np.float32), (5, 1, 1))  # mean 0, variance 8/3
    signals = [
        (node_spec(2), node),
        (v2v_spec(1), v2v),
        (atomic_energies_spec(), np.array([0.5, -0.5, 0.5, -0.5, 0.5])),
        (energy_spec(), np.array([0.0, 0.5])),
        (forces_spec(), np.zeros((5, 3), np.float32)),
        (node_spec(1, "layer/H3"), np.array([[0.0], [2.0], [0.0], [2.0], [1.0]], np.float32)),  # variance 0.8
        (e2n_spec(1), 3 * np.array([[0.0], [2.0], [0.0], [2.0], [1.0]], np.float32)),  # 9 times as much
    ]
    store = Store.open(path, mode="a")
    store.add_teacher("hand", {"name": "hand", "weights_sha256": "0" * 64})
    for spec, values in signals:
        with store.shard_writer(store.add_signal("hand", spec, "fp32"), 0) as writer:
            writer.write({"values": values})
    with store.shard_writer(store.add_signal("hand", edge_spec(2), "fp32"), 0) as writer:
        writer.write(
            {
                "values": np.array([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [3.0, 0.0]], np.float32),  # 1 and 0
                "index": np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.int32),
                "shift": np.zeros((4, 3), np.int16),
                "n_edges": np.array([2, 2], np.int32),
            }
        )
    finalize(store)
    return path


def weight_of(store, tmp_path, *, scale="none", **term):
    config = train_config(
        store,
        tmp_path,
        val_fraction=0.0,
        training={"normalization": scale, "references": "none"},
        kd=[{"weight": "auto"} | term],
    )
    (weight,) = prepare(Cache.open(store), config, choose_device("cpu")).objective.weights.values()
    return weight


@pytest.mark.parametrize(
    ("term", "start"),
    [
        ({"name": "n2n"}, 0.48),  # mean over channels of 0.96 and 0
        ({"name": "n2n", "loss": "mae"}, 0.48**0.5),
        ({"name": "n2n", "loss": "huber"}, 0.236),  # errors 0.8 and 1.2: (3 x 0.32 + 2 x 0.7) / 10
        ({"name": "n2n", "loss": "huber", "delta": 0.5}, 0.1775),  # (3 x 0.275 + 2 x 0.475) / 10
        ({"name": "v2v", "loss": "huber"}, 1.0),  # 2, -2 and 0 around zero: (1.5 + 1.5 + 0) / 3
        ({"name": "v2v"}, 8 / 3),
        ({"name": "n2n", "loss": "cka"}, 1.0),  # unrelated features
        # H3 is 0, 2 and 0, 2, 1. Squares of squared distances: 2 x 16 of 4 pairs; 2 x (16 + 1 + 1) of 9.
        ({"name": "n2n", "teacher_tap": "H3", "loss": "gsp"}, (8 + 4) / 2),
        # Distances 2 and 1 from the first two atoms of the second system: the rest shares evenly anyway.
        ({"name": "n2n", "teacher_tap": "H3", "loss": "lsp"}, 2 * UNEVEN / 5),
        ({"name": "vanilla2"}, 0.5),
        ({"name": "n2n", "student_taps": ["U1", "M2"]}, 0.48),  # whatever of the student learns it
        ({"name": "n2n", "teacher_tap": "H3"}, 0.8),
        ({"name": "n2n", "teacher_tap": "H3", "loss": "mae"}, 0.8**0.5),
        ({"name": "e2n"}, 7.2),
        ({"name": "e2e"}, 0.5),
    ],
    ids=lambda term: "-".join(map(str, term.values())) if isinstance(term, dict) else "",
)
def test_auto_starts_the_term_as_large_as_the_base_loss(hand_store, tmp_path, term, start):
    assert weight_of(hand_store, tmp_path, **term) == pytest.approx(L0 / start, rel=1e-6)


def test_atoms_that_are_alike_teach_no_relation(hand_store, tmp_path):
    with pytest.raises(CacheError, match=r"signal v2v of hand is the same everywhere.*--kd v2v,loss=gsp"):
        weight_of(hand_store, tmp_path, name="v2v", loss="gsp")


def test_a_loss_on_labels_that_is_zero_says_nothing_about_a_weight(hand_store, tmp_path):
    config = train_config(
        hand_store,
        tmp_path,
        val_fraction=0.0,
        training={"normalization": "none", "references": "none", "energy_weight": 0, "forces_weight": 0},
        kd=[{"name": "n2n"}],
    )
    with pytest.raises(ConfigError, match=r"--kd n2n: auto .* zero here.*give its weight as a number"):
        prepare(Cache.open(hand_store), config, choose_device("cpu"))


def test_grad_is_weighed_by_the_labelled_forces(hand_store, tmp_path):
    """The slope of a flat energy is off by the length of the forces, 0.5 on free atoms."""
    assert weight_of(hand_store, tmp_path, name="grad") == pytest.approx(L0 / 0.5, rel=1e-6)


def test_vanilla1_is_in_the_units_of_the_labels_already(hand_store, tmp_path):
    assert weight_of(hand_store, tmp_path, name="vanilla1") == 1.0


def test_a_number_is_taken_as_it_is(hand_store, tmp_path):
    assert weight_of(hand_store, tmp_path, name="n2n", weight=10_000) == 10_000


def test_the_base_loss_is_measured_in_normalised_units(hand_store, tmp_path):
    """Energies 1 and -3: mean -1, std 2; then |E| is 1 and |F| 0.25."""
    expected = (1 + 100 * 0.25) / 0.48
    assert weight_of(hand_store, tmp_path, scale="energy", name="n2n") == pytest.approx(expected, rel=1e-6)


def test_missing_labels_do_not_count(mixed_store, tmp_path):
    cache = Cache.open(mixed_store)
    config = train_config(mixed_store, tmp_path, kd=[{"name": "n2n"}])
    setup = prepare(cache, config, choose_device("cpu"))
    statistics, scale = label_statistics(cache, setup.train), setup.potential.scale
    systems = [cache[int(i)] for i in np.flatnonzero(setup.train)]
    energies, lengths = [], []
    for s in systems:
        reference = scale.energy_mean + sum(scale.references[int(z)] for z in s["atomic_numbers"])
        energies.append((s["energy"][0] - reference) / scale.energy_std)
        lengths += np.linalg.norm(s["forces"][~s["fixed"]] / scale.forces_std, axis=1).tolist()
    assert np.isnan(energies).any()
    assert np.isnan(lengths).any()
    expected = np.nanmean(np.abs(energies)) + 100 * np.nanmean(lengths)
    assert zero_model_loss(statistics, scale, config) == pytest.approx(expected, rel=1e-5)
