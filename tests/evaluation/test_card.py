"""Model cards: everything known is said, nothing is guessed, and the example in the card runs."""

import json
import re

import ase.build
import ase.io
import numpy as np
import pytest

from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.evaluation.card import model_card, write_card
from molkd.pipeline.evaluation.report import write_report
from molkd.pipeline.evaluation.seeds import SeedStat
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model

MODEL = {
    "name": "painn",
    "hidden_channels": 16,
    "num_layers": 1,
    "num_rbf": 8,
    "cutoff": 4.0,
    "direct_forces": True,
}
PROVENANCE = {
    "student": "painn-small",
    "elements": [1, 6, 8],
    "dataset_fingerprint": "f00d",
    "n_training_energies": 450,
    "kd": [{"name": "n2n", "weight": 12.5, "head": "linear", "loss": "mse"}],
    "teacher": {
        "name": "big", "architecture": "PaiNN", "weights_sha256": "abc123", "citation": "A. Teacher (2024)",
        "licence": "MIT", "energy_reference": "totals", "taps": {"node": "after the last update"},
    },
}  # fmt: skip
RESULTS = {
    "val": {"energy_mae_meV": 30.0, "force_mae_meV_A": 40.0, "force_cos": 0.98, "efwt_percent": None},
    "test": {"test_300K": {"energy_mae_meV": 31.0}}, "n_parameters": 123456, "seconds": 61.0, "seed": 7,
    "best_step": 900,
}  # fmt: skip
SCALE = {"energy_mean": 0.5, "energy_std": 2.0, "forces_std": 1.5, "references": {"1": -13.6, "8": -2041.3}}


def _card(**changes):
    metadata = {"model": MODEL, "scale": SCALE, "provenance": PROVENANCE} | changes.pop("metadata", {})
    return model_card(**{"name": "n2n student", "metadata": metadata, "results": RESULTS} | changes)


def test_card_says_what_is_known():
    card = _card(
        over_seeds={"test_300K": {"energy_mae_meV": SeedStat(32.0, 1.5, 3)}},
        data={"licence": "CC0", "citation": "Data (2025)"},
        limits=["No spin."],
        weights_sha256="beef",
    )
    for fact in (
        "# n2n student", "- architecture: painn", "- parameters: 123,456", "- elements: H C O",
        "hidden_channels 16",
        "sha256 beef", "- dataset fingerprint: f00d", "- energy labels: 450", "- licence: CC0",
        "- loss n2n: weight 12.5, head linear, loss mse", "- teacher: big", "sha256 abc123",
        "node after the last update", "- its licence: MIT", "H -13.600000, O -2041.300000",
        "energy mean 0.500000 eV",
        "| validation | this one, seed 7 | 30.0 | 40.0 | 0.9800 | – |",
        "| test_300K | this one, seed 7 | 31.0 | – | – | – |",
        "| test_300K | mean ± spread, 3 seeds | 32.0 ± 1.5 | – | – | – |",
        "not the gradient of the energy", "- No spin.", "arXiv:2306.14818", "- Teacher: A. Teacher (2024)",
        "- Data: Data (2025)",
    ):  # fmt: skip
        assert fact in card


def test_card_tells_how_weights_were_found_and_when_they_fade():
    terms = [
        {"name": "grad", "label": "grad", "weight": 10.25, "weight_by": "balance", "fade": [0.5, 0.8]},
        {"name": "n2n", "label": "n2n", "weight": 3.0, "weight_by": "given", "fade": None, "head": "linear"},
    ]
    card = _card(metadata={"provenance": PROVENANCE | {"kd": terms, "gradient_weight": 4.0}})
    for line in (
        "- loss grad: weight 10.25 (balance), fading from 0.5 to 0.8 of the run\n",
        "- loss n2n: weight 3, head linear\n",
        "- the labelled forces also taught the energy its slope: weight 4\n",
    ):
        assert line in card


def test_card_of_a_run_without_a_teacher_tells_the_slope_of_labels():
    alone = PROVENANCE | {"kd": [], "gradient_weight": 4.0}
    assert "None: trained on the labels alone (`--kd none`); the labelled forces also taught" in _card(
        metadata={"provenance": alone}
    )
    assert "(`--kd none`).\n" in _card(metadata={"provenance": alone | {"gradient_weight": 0.0}})


def test_card_tells_every_choice_of_a_loss_once():
    huber = {"name": "n2n", "label": "n2n:U4,head=mlp,loss=huber,delta=0.5", "weight": 3.0, "head": "mlp"}
    terms = [
        huber | {"loss": "huber", "delta": 0.5},
        {"name": "v2v", "weight": 1.0, "loss": "mae", "delta": 1.0},
    ]
    card = _card(metadata={"provenance": PROVENANCE | {"kd": terms}})
    assert (
        "- loss n2n:U4: weight 3, head mlp, loss huber, delta 0.5\n- loss v2v: weight 1, loss mae\n" in card
    )


def test_card_names_the_stores_that_were_mixed_in():
    mix = {"store": "rattled.kdcache", "share": 0.25, "weight_ratio": 0.5, "n_training_systems": 900}
    mix |= {"n_training_energies": 0, "dataset_fingerprint": "cafe", "data": {"licence": "CC-BY-4.0"}}
    card = _card(metadata={"provenance": PROVENANCE | {"mix": [mix, mix | {"store": "other", "data": {}}]}})
    expected = "0.25 of each batch, weight ratio 0.5, 900 systems, 0 energy labels, dataset fingerprint cafe"
    assert f"- mixed in: rattled.kdcache (licence CC-BY-4.0): {expected}; other (licence not" in card
    assert "mixed in" not in _card()


def test_card_of_a_plain_run_claims_no_teacher():
    plain = {k: v for k, v in PROVENANCE.items() if k != "teacher"} | {"kd": []}
    card = _card(metadata={"provenance": plain, "model": MODEL | {"direct_forces": False}})
    assert "trained on the labels alone" in card
    assert "Teacher:" not in card
    assert "2306.14818" not in card
    assert "not the gradient" not in card
    assert "- licence: not recorded" in card


def test_card_of_an_unknown_model_guesses_nothing():
    card = model_card(name="x", metadata={}, results={})
    assert "Not measured." in card
    assert "None" not in card.replace("None: trained on the labels alone", "")


@pytest.fixture
def run_with_model(make_run):
    folder = make_run("n2n")
    scale = LabelScale(references={1: -13.6, 8: -2041.3})
    Potential(build_model(MODEL), scale, {"model": MODEL, "provenance": PROVENANCE}).save(
        folder / "best.safetensors"
    )
    return folder


def test_the_example_in_the_card_runs(run_with_model, tmp_path, monkeypatch):
    card = write_card(run_with_model, RESULTS, {}).read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    ase.io.write("structure.xyz", ase.build.molecule("H2O"))
    names = {}
    exec(code, names)
    assert names["forces"].shape == (3, 3)
    assert np.isfinite(names["energy"])
    assert -2150 < names["energy"] < -1950  # references of H2O: -2068.5 eV


def test_the_report_writes_cards_with_mean_and_spread(run_with_model, make_run, tmp_path):
    write_report([run_with_model, make_run("other", seed=1, energy=52.0)], tmp_path / "out")
    card = (run_with_model / "card.md").read_text()
    assert "| test | mean ± spread, 2 seeds | 51.0 ± 1.4 |" in card
    assert json.loads((run_with_model / "metrics.json").read_text())["seed"] == 0
