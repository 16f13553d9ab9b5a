"""Extended xyz with all the digits that a store has: labels, and the teacher's energies and forces."""

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.groups import ATOMS
from molkd.cache_schema.regroup import Arrays
from molkd.pipeline.sharing.choice import Choice

_KINDS = {"f": "R", "u": "I", "i": "I", "b": "L"}


def write_extxyz(file: BinaryIO, choice: Choice, on_systems: Callable[[int], object]) -> None:
    """Write a frame a system, in stored order; bad systems lack the teacher's values.

    Labels stand as `energy` and `forces` where they are whole, signals as ``teacher_signal``.
    """
    for part in choice.pieces(ATOMS):
        atoms = choice.read(ATOMS, part, decode=True)
        signals = {g: choice.read(g, part, decode=True)["values"] for g in choice.groups}
        file.writelines(frame.encode() for frame in _frames(choice, part, atoms, signals))
        on_systems(len(part))


def fits_extxyz(spec: FieldSpec) -> bool:
    """Say whether a signal belongs into extxyz: energies and forces do, features are for an npz."""
    return spec.unit != "1"


def _frames(
    choice: Choice, part: NDArray[np.int64], atoms: Arrays, signals: dict[str, NDArray[Any]]
) -> Iterator[str]:
    table, ends = choice.systems, np.cumsum(choice.n_atoms[part])
    on_atoms = {g: v for g, v in signals.items() if choice.signal(g).spec.axis == "atom"}
    for k, i in enumerate(part):
        rows = slice(ends[k] - choice.n_atoms[i], ends[k])
        own = {name: values[rows] for name, values in atoms.items()}
        columns: dict[str, NDArray[Any]] = {"pos": own["positions"]}
        if np.isfinite(own["forces"]).all():
            columns["forces"] = own["forces"]
        columns |= {"tags": own["tags"], "fixed": own["fixed"]}
        columns |= {_name(g): v[rows] for g, v in on_atoms.items() if np.isfinite(v[rows]).all()}
        facts = {
            "Lattice": " ".join(map(_number, table["cell"][i].ravel())) if table["pbc"][i].any() else "",
            "pbc": " ".join("T" if one else "F" for one in table["pbc"][i]),
            "energy": _number(table["energy"][i]) if np.isfinite(table["energy"][i]) else "",
        }
        for g, v in signals.items():
            if g not in on_atoms and np.isfinite(v[k]).all():
                facts[_name(g)] = " ".join(map(_number, np.ravel(v[k])))
        facts["id"] = table["id"][i].tobytes().hex()
        name = choice.cache.source_names[table["source"][i]]
        facts["source"] = f"{name}#{table['source_row'][i]}"
        yield _frame(own["atomic_numbers"], columns, facts)


def _frame(numbers: NDArray[np.uint8], columns: dict[str, NDArray[Any]], facts: dict[str, str]) -> str:
    flat = {name: values.reshape(len(numbers), -1) for name, values in columns.items()}
    kinds = [f"{name}:{_KINDS[values.dtype.kind]}:{values.shape[1]}" for name, values in flat.items()]
    head = [f"{key}={_quoted(value)}" for key, value in facts.items() if value]
    head.insert(0, f"Properties=species:S:1:{':'.join(kinds)}")
    texts = [[chemical_symbols[z] for z in numbers]]
    texts += [list(map(_number, column)) for values in flat.values() for column in values.T]
    lines = [" ".join(row) for row in zip(*texts, strict=True)]
    return "\n".join([str(len(numbers)), " ".join(head), *lines]) + "\n"


def _number(value: Any) -> str:
    """Return the shortest text that reads back as the same number."""
    if isinstance(value, np.bool_):
        return "T" if value else "F"
    return str(value.item()) if isinstance(value, np.integer) else np.format_float_positional(value, trim="0")


def _quoted(value: str) -> str:
    if value.replace("-", "").replace(".", "").replace("_", "").isalnum():
        return value
    text = "".join(c if c.isprintable() else " " for c in value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _name(group: str) -> str:
    return "_".join(group.split("/")[1:])
