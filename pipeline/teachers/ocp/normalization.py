"""The units of a checkpoint: means and standard deviations under both namings, references of elements."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.errors import DataError, TeacherError
from molkd.pipeline.teachers.ocp.reading import as_number

log = logging.getLogger(__name__)

_NAMES = {"energy": ("energy", "target"), "forces": ("forces", "grad_target")}  # since 2024, before
_STD_NAMES = ("rmsd", "std", "stdev")


def read_label_scale(checkpoint: Mapping[str, Any], path: Path) -> LabelScale:
    """Return how outputs become eV and eV/A: ``energy = output * std + mean + references`` per system.

    Raises
    ------
    TeacherError
        If a value is unreadable, forces have a mean, or references are of anything but energies.
    """
    normalizers = _mapping(checkpoint.get("normalizers"))
    unknown = sorted(set(normalizers) - {name for names in _NAMES.values() for name in names})
    if unknown and len(unknown) == len(normalizers):
        raise TeacherError(
            f"{path}: it normalises {', '.join(unknown)}, expected energy and forces; "
            "take a checkpoint that was trained on energies and forces"
        )
    if unknown:
        log.warning("%s: normalisers of %s are ignored", path, ", ".join(unknown))
    energy_mean, energy_std = _mean_and_std(checkpoint, "energy", path)
    forces_mean, forces_std = _mean_and_std(checkpoint, "forces", path)
    if forces_mean != 0:
        raise TeacherError(
            f"{path}: its forces have a mean of {forces_mean} eV/A, expected 0; take another one"
        )
    try:
        return LabelScale(energy_mean, energy_std, forces_std, _references(checkpoint, path))
    except DataError as error:
        raise TeacherError(
            f"{path}: its normalisation makes no sense ({error}); take another checkpoint"
        ) from None


def reference_in_words(checkpoint: Mapping[str, Any]) -> str:
    """Return what the energies are relative to, as far as a checkpoint tells."""
    text = "as the labels it was trained on (OC20 checkpoints: adsorption energies)"
    dataset = _dataset(checkpoint)
    for key, meaning in (("lin_ref", "linear references"), ("oc20_ref", "OC20's reference energies")):
        if dataset.get(key):
            text += f", {meaning} of {dataset[key]} concern the labels and are not undone"
    return text


def _mean_and_std(checkpoint: Mapping[str, Any], quantity: str, path: Path) -> tuple[float, float]:
    """Look among the normalisers, then in the config of the data; found nowhere, nothing was scaled."""
    new, old = _NAMES[quantity]
    dataset = _dataset(checkpoint)
    in_config = _mapping(_mapping(dataset.get("transforms")).get("normalizer"))
    for normalizers in (_mapping(checkpoint.get("normalizers")), in_config):
        for name in (new, old):
            values = _mapping(normalizers.get(name))
            std = next((values[key] for key in _STD_NAMES if key in values), None)
            if std is not None:
                return _number(values.get("mean", 0.0), name, path), _number(std, name, path)
    if dataset.get("normalize_labels") and f"{old}_std" in dataset:
        mean = _number(dataset.get(f"{old}_mean", 0.0), f"{old}_mean", path)
        return mean, _number(dataset[f"{old}_std"], f"{old}_std", path)
    return 0.0, 1.0


def _references(checkpoint: Mapping[str, Any], path: Path) -> dict[int, float]:
    """Return the energy of each element in eV, by atomic number."""
    elementrefs = _mapping(checkpoint.get("elementrefs"))
    if set(elementrefs) - {"energy"}:
        raise TeacherError(
            f"{path}: it holds references of elements for {', '.join(sorted(map(str, elementrefs)))}; "
            "only those for the energy are supported"
        )
    if not elementrefs:
        return {}
    table = _mapping(elementrefs["energy"]).get("element_references")
    if not isinstance(table, torch.Tensor) or table.dim() != 1:
        raise TeacherError(
            f"{path}: its references of elements are no list of energies; take another checkpoint"
        )
    values = table.detach().double().numpy()
    return {int(z): float(values[z]) for z in np.flatnonzero(values)}


def _dataset(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the training data; the oldest configs hold a list whose first entry they are."""
    dataset = _mapping(checkpoint.get("config")).get("dataset")
    if isinstance(dataset, list) and dataset:
        dataset = dataset[0]
    dataset = _mapping(dataset)
    return _mapping(dataset["train"]) if "train" in dataset else dataset


def _number(value: Any, name: str, path: Path) -> float:
    number = as_number(value)
    if number is not None:
        return number
    raise TeacherError(f"{path}: the normaliser {name} should be one number, found {value!r}")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
