"""The schnetpack PaiNN against the published values and against loops over pairs in numpy."""

import numpy as np
import pytest
import torch
from ase import Atoms
from teacher_cases import ETHANOL_WEIGHTS, batch_of, random_schnetpack_arrays, structures

from molkd.pipeline.errors import TeacherError
from molkd.pipeline.teachers.load import load_teacher

KCAL = 4.184 / 96.48533212331002  # eV: 4184 J/mol over the Faraday constant in C/mol
FEATURES = 1e-12  # float64, observed 5e-15
ENERGY = 1e-8  # eV of 4,210 eV
FORCES = 1e-9  # eV/A


@pytest.mark.skipif(
    not ETHANOL_WEIGHTS.exists(), reason=f"no pretrained ethanol weights at {ETHANOL_WEIGHTS}"
)
def test_reproduces_the_published_values():
    expected = np.load(ETHANOL_WEIGHTS / "expected_painn_1.npz", allow_pickle=False)
    teacher = load_teacher(str(ETHANOL_WEIGHTS / "painn_1.npz"), device="cpu", dtype=torch.float64)
    systems = [Atoms(expected["numbers"], positions=positions) for positions in expected["positions"]]
    out = teacher.compute(batch_of(systems, teacher.neighbor_rule), list(teacher.signals))
    for key, name, bound in (
        ("energy", "energy_eV", ENERGY),
        ("forces", "forces_eV_A", FORCES),
        ("node", "scalar_features", FEATURES),
        ("v2v", "vector_features", FEATURES),
    ):
        error = out[key].numpy().reshape(expected[name].shape) - expected[name]
        assert np.abs(error).max() < bound, key
    assert teacher.info.name == "painn_1"


def silu(x):
    return x / (1 + np.exp(-x))


def by_hand(w, atoms):
    """Energy in kcal/mol and features of a molecule: the published formulas, pair by pair."""
    layer = lambda name, x: w[f"{name}.weight"].astype(float) @ x + w[f"{name}.bias"]  # noqa: E731
    net = lambda name, x: layer(f"{name}.1", silu(layer(f"{name}.0", x)))  # noqa: E731
    n, f = len(atoms), w["embedding.weight"].shape[1]
    q = [w["embedding.weight"][z].astype(float) for z in atoms.numbers]
    mu = [np.zeros((3, f)) for _ in range(n)]
    for number in range(len(w["filter_net.weight"]) // (3 * f)):
        new_q, new_mu = [x.copy() for x in q], [x.copy() for x in mu]
        for i in range(n):
            for j in range(n):
                vector = atoms.positions[j] - atoms.positions[i]
                d = np.linalg.norm(vector)
                if i == j or d >= 5:
                    continue
                rbf = np.exp(-0.5 * ((d - w["radial_basis.offsets"]) / w["radial_basis.widths"]) ** 2)
                filters = layer("filter_net", rbf) * 0.5 * (np.cos(np.pi * d / 5) + 1)
                part = filters[3 * f * number : 3 * f * (number + 1)]
                message = part * net(f"interactions.{number}.interatomic_context_net", q[j])
                a, b, e = message[:f], message[f : 2 * f], message[2 * f :]
                new_q[i] += a
                new_mu[i] += np.outer(vector / d, b) + mu[j] * e
        for i in range(n):
            mix = new_mu[i] @ w[f"mixing.{number}.mu_channel_mix.weight"].astype(float).T
            v, u = mix[:, :f], mix[:, f:]
            norm = np.sqrt((v**2).sum(0) + 1e-8)
            context = net(f"mixing.{number}.intraatomic_context_net", np.concatenate([new_q[i], norm]))
            a, b, e = context[:f], context[f : 2 * f], context[2 * f :]
            q[i] = new_q[i] + a + e * (v * u).sum(0)
            mu[i] = new_mu[i] + b * u
    mean = float(w["energy_mean_per_atom_kcal_mol"])
    return [net("readout", x)[0] + mean for x in q], q, mu


def test_random_weights_agree_with_loops_over_pairs(tmp_path):
    arrays = random_schnetpack_arrays()
    np.savez(tmp_path / "w.npz", **arrays)
    teacher = load_teacher(str(tmp_path / "w.npz"), device="cpu", dtype=torch.float64)
    atoms = structures()[0]
    atoms.positions[-1] += [4.0, 0.0, 0.0]  # some pairs are out of reach
    out = teacher.compute(batch_of([atoms], teacher.neighbor_rule), list(teacher.signals))
    energies, q, mu = by_hand(arrays, atoms)
    np.testing.assert_allclose(out["node"], q, atol=1e-11)
    np.testing.assert_allclose(out["v2v"], mu, atol=1e-11)
    # ASE's and today's Faraday constant differ by 1e-8
    np.testing.assert_allclose(out["atomic_energies"], np.array(energies) * KCAL, rtol=2e-8)


def test_float32_keeps_the_energy_in_float64(tmp_path):
    arrays = random_schnetpack_arrays()
    arrays["energy_mean_per_atom_kcal_mol"] = np.array(-1.0786e6)  # float32 would be off by 5 meV an atom
    np.savez(tmp_path / "w.npz", **arrays)
    energies = []
    for dtype in (torch.float32, torch.float64):
        teacher = load_teacher(str(tmp_path / "w.npz"), device="cpu", dtype=dtype)
        energies.append(teacher.compute(batch_of(structures(), teacher.neighbor_rule, dtype), ["energy"]))
    torch.testing.assert_close(energies[0]["energy"], energies[1]["energy"], rtol=0, atol=1e-5)


def test_an_element_that_was_not_trained_is_never_a_number(tmp_path):
    np.savez(tmp_path / "w.npz", **random_schnetpack_arrays())
    teacher = load_teacher(str(tmp_path / "w.npz"), device="cpu")
    assert teacher.atomic_numbers == {1, 6, 8}
    nitrogen = Atoms("N2", positions=[[0, 0, 0], [0, 0, 1.1]])
    batch = batch_of([*structures(), nitrogen], teacher.neighbor_rule, torch.float32)
    energy = teacher.compute(batch, ["energy"])["energy"]
    assert energy.isnan().tolist() == [False, False, False, True]


def test_a_file_that_is_not_such_a_model_lists_all_problems(tmp_path):
    arrays = random_schnetpack_arrays()
    del arrays["readout.1.bias"]
    arrays["mixing.1.mu_channel_mix.weight"] = np.zeros((3, 8), np.float32)
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(TeacherError) as error:
        load_teacher(str(tmp_path / "w.npz"))
    message = str(error.value)
    assert message.startswith(str(tmp_path / "w.npz"))
    assert "readout.1.bias is missing" in message
    assert "mixing.1.mu_channel_mix.weight has shape (3, 8), expected (16, 8)" in message


def test_foreign_damaged_and_missing_files_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", R=np.zeros(3))
    (tmp_path / "text.npz").write_text("not a zip")
    np.savez(tmp_path / "cut.npz", **random_schnetpack_arrays())
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    np.savez(tmp_path / "object.npz", **{"embedding.weight": np.array([{}], dtype=object)})
    for name in ("other", "text", "cut", "object", "absent"):
        with pytest.raises(TeacherError, match=rf"{name}\.npz: "):
            load_teacher(str(tmp_path / f"{name}.npz"))
