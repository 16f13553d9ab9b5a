"""Evaluation of a `predict` callable: known errors, batch independence, bad output, files."""

import json
import zipfile
from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch

from molkd.pipeline.data.system import System
from molkd.pipeline.errors import DataError, ModelError
from molkd.pipeline.evaluation.evaluate import evaluate
from molkd.pipeline.evaluation.predictions import ExtxyzPredictions
from molkd.pipeline.evaluation.result import FOLDER, Evaluation, load_evaluations
from molkd.pipeline.evaluation.sample import RowSample
from molkd.pipeline.evaluation.worst import WorstSystems
from molkd.pipeline.graphs.neighbors import NeighborRule

RULE = NeighborRule(cutoff=3.0)
SUM_TOLERANCE = 1e-12  # relative; the same float64 numbers summed in another order
FLOAT32 = 1e-6  # relative; predictions come in float32


def _system(n_atoms: int, index: int, energy: float | None = None, labelled: bool = True) -> System:
    positions = np.arange(3.0 * n_atoms).reshape(n_atoms, 3) + 0.1 * index
    return System(
        atomic_numbers=np.full(n_atoms, 6, np.uint8),
        positions=positions,
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        energy=float(n_atoms) if energy is None else energy,
        forces=positions.copy() if labelled else np.full((n_atoms, 3), np.nan),
        tags=np.zeros(n_atoms, np.uint8),
        fixed=np.arange(n_atoms) == 2,
        source=f"made.extxyz#{index}",
    )


def _predict(batch):
    """Energy: number of atoms + 0.25 eV; forces: positions + (0.5, 0, 0) eV/A."""
    shift = batch.positions.new_tensor([0.5, 0.0, 0.0])
    return {"energy": batch.atoms_ptr.diff().double() + 0.25, "forces": batch.positions + shift}


def _systems():
    return [_system(1 + i % 4, i) for i in range(23)]


def test_known_errors_are_found():
    seen = []
    result = evaluate(_predict, iter(_systems()), RULE, batch_size=5, on_batch=seen.append)
    assert result.metrics.energy_mae == pytest.approx(0.25)
    assert result.metrics.force_mae == pytest.approx(0.5 / 3, rel=FLOAT32)
    assert result.metrics.efwt == 0
    assert result.metrics.n_systems == 23
    assert seen == [5, 10, 15, 20, 23]
    assert result.systems_per_second > 0
    assert set(result.to_report()) == {
        "energy_mae_meV", "force_mae_meV_A", "force_cos", "efwt_percent", "systems_per_second",
    }  # fmt: skip


def test_results_do_not_depend_on_the_batch_size():
    results = [evaluate(_predict, _systems(), RULE, batch_size=n) for n in (1, 7, 100)]
    for other in results[1:]:
        assert vars(other.metrics) == pytest.approx(vars(results[0].metrics), rel=SUM_TOLERANCE)
        np.testing.assert_array_equal(other.parity.energy_pred, results[0].parity.energy_pred)
        np.testing.assert_array_equal(other.parity.forces_label, results[0].parity.forces_label)


def test_throughput_counts_full_batches_after_warm_up_calls():
    calls = []

    def counting(batch):
        calls.append(batch.n_systems)
        return _predict(batch)

    evaluate(counting, _systems(), RULE, batch_size=10)
    # three warm-up calls, two full batches and one that is not, and the first again for five repeats in all
    assert calls == [10, 10, 10, 10, 10, 3, 10, 10, 10]
    calls.clear()
    assert (
        evaluate(counting, _systems(), RULE, batch_size=10, measure_throughput=False).systems_per_second
        is None
    )
    assert calls == [10, 10, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same():
    on_cpu, on_gpu = (evaluate(_predict, _systems(), RULE, batch_size=5, device=d) for d in ("cpu", "cuda"))
    assert vars(on_gpu.metrics) == pytest.approx(vars(on_cpu.metrics), rel=FLOAT32)
    assert on_gpu.systems_per_second > 0


def test_models_run_without_gradients():
    def checking(batch):
        assert not torch.is_grad_enabled()
        return _predict(batch)

    evaluate(checking, _systems(), RULE)


def test_fixed_atoms_and_missing_labels_leave_the_parity_sample():
    systems = [_system(4, 0), _system(2, 1, energy=np.nan), _system(3, 2, labelled=False)]
    parity = evaluate(_predict, systems, RULE).parity
    np.testing.assert_array_equal(parity.n_atoms, [4, 3])
    np.testing.assert_array_equal(parity.energy_label, [4.0, 3.0])
    free = np.concatenate([systems[0].forces[[0, 1, 3]], systems[1].forces])
    np.testing.assert_allclose(parity.forces_label, free)


def test_predictions_are_handed_over_system_by_system(tmp_path):
    systems = [_system(3, 0), _system(2, 1, energy=np.nan, labelled=False), _system(1, 2)]
    path = tmp_path / "new" / "predictions.extxyz"
    with ExtxyzPredictions(path) as out:
        evaluate(_predict, systems, RULE, batch_size=2, on_prediction=out.add)
        assert not path.exists()
    frames = ase.io.read(path, ":")
    assert [len(f) for f in frames] == [3, 2, 1]
    assert [f.info["predicted_energy"] for f in frames] == [3.25, 2.25, 1.25]
    np.testing.assert_allclose(
        frames[1].arrays["predicted_forces"], systems[1].positions + np.array([0.5, 0, 0]), rtol=FLOAT32
    )
    assert frames[0].get_potential_energy() == 3.0
    assert frames[1].calc is None
    assert frames[0].info["source"] == "made.extxyz#0"
    np.testing.assert_array_equal(frames[0].arrays["fixed"], systems[0].fixed)


def test_failed_evaluation_leaves_no_predictions(tmp_path):
    path = tmp_path / "predictions.extxyz"
    with pytest.raises(ModelError), ExtxyzPredictions(path) as out:
        evaluate(lambda batch: {"energy": batch.cell}, _systems(), RULE, on_prediction=out.add)
    assert list(tmp_path.iterdir()) == []


def test_absent_output_is_named():
    with pytest.raises(ModelError, match="needs forces"):
        evaluate(lambda batch: {"energy": torch.zeros(batch.n_systems)}, _systems(), RULE)


@pytest.mark.parametrize(("key", "word"), [("energy", "energy"), ("forces", "forces")])
def test_non_finite_prediction_names_the_system(key, word):
    def broken(batch):
        out = _predict(batch)
        out[key][1] = torch.inf
        return out

    with pytest.raises(ModelError, match=rf"made.extxyz#1: the predicted {word} is not finite"):
        evaluate(broken, [_system(1, i) for i in range(3)], RULE)


def test_no_systems_is_an_error():
    with pytest.raises(DataError, match="no system"):
        evaluate(_predict, [], RULE)


def test_saved_evaluation_comes_back(tmp_path):
    result = evaluate(_predict, _systems(), RULE)
    result.save(tmp_path / FOLDER / "test_300K.npz")
    loaded = load_evaluations(tmp_path)["test_300K"]
    for name in (
        "metrics", "systems_per_second", "throughput", "energy_tail", "force_tail", "worst",
    ):  # fmt: skip
        assert getattr(loaded, name) == getattr(result, name)
    assert loaded.worst["energy"]
    assert loaded.breakdowns.keys() == result.breakdowns.keys() >= {"element", "size"}
    for kind, found in result.breakdowns.items():
        assert loaded.breakdowns[kind].keys == found.keys
        np.testing.assert_array_equal(loaded.breakdowns[kind].terms, found.terms)
    for name, values in vars(result.parity).items():
        np.testing.assert_array_equal(getattr(loaded.parity, name), values)


def test_file_of_an_older_version_is_read(tmp_path):
    """As it was written before throughput had conditions and errors had tails."""
    result = evaluate(_predict, _systems(), RULE)
    numbers = {**vars(result.metrics), "systems_per_second": 12.5, "weights_sha256": "ab"}
    np.savez(tmp_path / "old.npz", numbers=np.array(json.dumps(numbers)), **vars(result.parity))
    loaded = Evaluation.load(tmp_path / "old.npz")
    assert loaded.metrics == result.metrics
    assert (loaded.systems_per_second, loaded.weights_sha256) == (12.5, "ab")
    assert (loaded.throughput, loaded.energy_tail, loaded.breakdowns, loaded.worst) == (None, None, {}, {})


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"hello"])
def test_damaged_evaluation_is_named(tmp_path, content):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x.npz: not a readable evaluation"):
        Evaluation.load(path)


def test_truncated_evaluation_is_named(tmp_path):
    path = tmp_path / "x.npz"
    evaluate(_predict, _systems(), RULE).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"x.npz"):
        Evaluation.load(path)


def test_evaluation_with_a_wrong_byte_is_named(tmp_path):
    path = tmp_path / "x.npz"
    evaluate(_predict, _systems(), RULE).save(path)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        begin = file.getinfo("numbers.npy").header_offset + 80  # into the compressed data
    for place in range(begin, begin + 60):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        with pytest.raises(DataError, match=r"x.npz: not a readable evaluation"):
            Evaluation.load(path)
    np.savez(path, numbers=np.array("[" * 100_000))
    with pytest.raises(DataError, match=r"x.npz: not a readable evaluation"):
        Evaluation.load(path)


def test_the_worst_of_two_files_of_one_name_are_both_written(tmp_path):
    """A store that was made of a/x.extxyz and b/x.extxyz has two systems called x.extxyz#0."""
    path, worst = tmp_path / "worst.extxyz", WorstSystems(2)
    systems = [replace(_system(n, 0), source="x.extxyz#0") for n in (2, 3)]
    evaluate(_predict, systems, RULE, worst=worst)
    with ExtxyzPredictions(path) as out:
        out.add_worst(worst, 2)
    frames = ase.io.read(path, ":")
    assert sorted(len(f) for f in frames) == [2, 3]
    assert sorted(f.info["energy_rank"] for f in frames) == [1, 2]
    assert sorted(f.info["force_rank"] for f in frames) == [1, 2]


def test_sample_is_bounded_fair_and_blind_to_how_the_stream_is_cut():
    stream = np.arange(1000.0)[:, None]
    whole, cut = RowSample(100, n_columns=1, seed=3), RowSample(100, n_columns=1, seed=3)
    whole.add(stream)
    for part in np.split(stream, [1, 1, 40, 500, 977]):
        cut.add(part)
    np.testing.assert_array_equal(whole.rows(), cut.rows())
    assert len(np.unique(whole.rows())) == 100
    assert (np.diff(whole.rows()[:, 0]) > 0).all()

    hits = np.zeros(50)
    for seed in range(2000):
        sample = RowSample(10, n_columns=1, seed=seed)
        sample.add(np.arange(50.0)[:, None])
        hits[sample.rows()[:, 0].astype(int)] += 1
    assert abs(hits / 2000 - 0.2).max() < 0.05  # 0.2 expected, standard deviation 0.009
