"""One .npz file that numpy.load opens: values decoded; arrays are written row by row, never held whole."""

import json
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from molkd.cache_schema.groups import ATOMS
from molkd.pipeline.sharing.choice import ABOUT, Choice


def write_npz(file: BinaryIO, choice: Choice, on_systems: Callable[[int], object]) -> None:
    """Write `about` (a JSON text), a row a system, a row an atom, and signals as ``teacher/signal``.

    A signal on edges has ``teacher/signal/index`` beside it, atoms counted from 0 within their system, and
    ``/shift`` and ``/n_edges``.
    """
    with zipfile.ZipFile(file, "w") as archive:
        _add(archive, "about", np.array(json.dumps(_about(choice))))
        _add(archive, "source_names", np.array(choice.cache.source_names))
        for name, column in choice.systems.items():
            _add(archive, name, column)
        for group in (ATOMS, *choice.groups):
            names = choice.names(group, decode=True)
            for name in names:
                progress = on_systems if name == names[0] else None
                shape, dtype = _geometry(choice, group, name)
                rows = choice.rows(group, name, decode=True, on_systems=progress)
                _stream(archive, _member(group, name), shape, dtype, rows)


def _geometry(choice: Choice, group: str, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    layout = choice.cache.state(group).group.layouts[name]
    spec = layout.spec if group == ATOMS or name != "values" else choice.signal(group).spec
    return (choice.n_rows(group, name), *spec.shape), np.dtype(spec.dtype)


def _member(group: str, name: str) -> str:
    if group == ATOMS:
        return name
    signal = group.removeprefix("teachers/")
    return signal if name == "values" else f"{signal}/{name}"


def _about(choice: Choice) -> dict[str, Any]:
    cache = choice.cache
    signals = {
        _member(group, "values"): {
            "unit": choice.signal(group).spec.unit,
            "axis": choice.signal(group).spec.axis,
            "encoding": choice.signal(group).encoding,
        }
        for group in choice.groups
    }
    teachers = {group.split("/")[1]: None for group in choice.groups}
    return {
        "dataset": cache.dataset,
        "fingerprint": cache.fingerprint,
        "arrays": ABOUT,
        "signals": signals,
        "teachers": {name: cache.teachers[name].provenance for name in teachers},
    }


def _add(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    _stream(archive, name, array.shape, array.dtype, [array])


def _stream(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    rows: Iterable[NDArray[Any]],
) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(member, header)
        for piece in rows:
            member.write(np.ascontiguousarray(piece, dtype=dtype).tobytes())
