"""The zarr.json files: Zarr v3 metadata of groups and arrays, written and checked without a Zarr client."""

import json
from typing import Any

from molkd.cache_schema.encoding import ENCODINGS, check_signal_encoding
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import EDGE_INDEX, EDGE_SHIFT, FieldSpec
from molkd.cache_schema.layout import (
    CHUNK_ROWS,
    FORMAT,
    MAX_JSON_BYTES,
    ArrayLayout,
    check_name,
    check_signal_spec,
)
from molkd.cache_schema.untrusted import parse_json, shorten

_KEY = "molkd"  # our part of a group's attributes
_GEOMETRY = (
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "fill_value",
)
_SHOWN = 300  # characters of what is wrong with a signal
_ROWS = {"atom": "atom_row", "system": "system_slot", "edge": "edge_row"}


def group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def plain_document(
    shape: tuple[int, ...], dtype: str, dimension_names: list[str], unit: str
) -> dict[str, Any]:
    """Return the zarr.json of an array of one chunk, as under ``systems``."""
    return _array(shape, shape, dtype, [_bytes_codec(dtype)], dimension_names, {"units": unit})


def array_document(layout: ArrayLayout) -> dict[str, Any]:
    """Return the zarr.json of an array written shard by shard."""
    spec, dtype = layout.spec, str(layout.dtype)
    codecs = [_bytes_codec(dtype)]
    if layout.is_sharded:
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [layout.chunk_rows, *spec.shape],
                    "codecs": codecs,
                    "index_codecs": [_bytes_codec("uint64"), {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ]
    return _array(
        (layout.n_files * layout.rows_per_file, *spec.shape),
        (layout.rows_per_file, *spec.shape),
        dtype,
        codecs,
        [_ROWS[spec.axis], *inner_dimensions(layout)],
        {"units": spec.unit, "formula": ENCODINGS[layout.encoding].formula},
    )


def _array(
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    dtype: str,
    codecs: list[dict[str, Any]],
    dimension_names: list[str],
    attributes: dict[str, Any],
) -> dict[str, Any]:
    # A shard nobody wrote reads as NaN, not as zeros, in every Zarr client.
    fill: Any = "NaN" if dtype.startswith("float") else False if dtype == "bool" else 0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": attributes,
        "dimension_names": dimension_names,
    }


def _bytes_codec(dtype: str) -> dict[str, Any]:
    if dtype in ("int8", "uint8", "bool"):
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def inner_dimensions(layout: ArrayLayout) -> list[str]:
    """Return names for all axes of a stored array but the first; within a group one name has one length."""
    spec = layout.spec
    if spec in (EDGE_INDEX, EDGE_SHIFT):
        return ["end"] if spec == EDGE_INDEX else ["lattice_vector"]
    if not spec.shape:
        return []
    names = [f"component_{k}" for k in range(len(spec.shape))]
    if spec.symmetry == "vector" and spec.shape[0] == 3:
        names[0] = "xyz"
    if names[-1] != "xyz":
        names[-1] = "byte" if layout.encoding == "uint8" else "channel"  # packed codes have no channels
    return names


def dump(document: dict[str, Any]) -> bytes:
    """Return the bytes of a zarr.json file; equal documents give equal bytes."""
    try:
        return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CacheError(f"attributes must be plain JSON values: {error}") from error


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """Return the document of a zarr.json file; its attributes are a dictionary.

    Raises
    ------
    IntegrityError
        If it is not one.
    """
    try:
        document = parse_json(raw, MAX_JSON_BYTES)
    except ValueError as error:
        raise IntegrityError(
            f"{where}: damaged, not JSON ({error}); restore it from a copy of the store"
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("attributes", {}), dict):
        raise IntegrityError(f"{where}: damaged, not Zarr v3 metadata; restore it from a copy of the store")
    document.setdefault("attributes", {})
    return document


def geometry(document: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of an array's zarr.json that say where its values lie."""
    return {key: document.get(key) for key in _GEOMETRY}


def check_array(document: dict[str, Any], layout: ArrayLayout, where: str) -> None:
    """Refuse an array whose stored geometry is not the one that plan and signal give.

    Raises
    ------
    IntegrityError
        Naming every entry that differs.
    """
    expected = geometry(array_document(layout))
    wrong = [key for key, value in geometry(document).items() if value != expected[key]]
    if wrong:
        raise IntegrityError(
            f"{where}: {', '.join(wrong)} differ from plan and signal; restore it from a copy of the store"
        )


def teacher_attributes(name: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a teacher's group."""
    return {_KEY: {"kind": "teacher", "name": name, "provenance": provenance}}


def signal_entry(spec: FieldSpec, encoding: str, formula: str) -> dict[str, Any]:
    """Return what a signal's group says about it."""
    entry = {
        "kind": "signal",
        "name": spec.name,
        "axis": spec.axis,
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "unit": spec.unit,
        "symmetry": spec.symmetry,
        "encoding": encoding,
        "formula": formula,
    }
    return entry | ({"max_per_atom": spec.max_per_atom} if spec.axis == "edge" else {})


def signal_attributes(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a signal's group."""
    return {_KEY: entry}


def kind(document: dict[str, Any]) -> str:
    """Return what a group is: "teacher", "signal", or "" for a group that only holds others."""
    entry = document["attributes"].get(_KEY)
    found = entry.get("kind") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else ""


def read_teacher(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the provenance in a teacher's group.

    Raises
    ------
    IntegrityError
        If the group is no teacher's.
    """
    entry = document["attributes"].get(_KEY)
    provenance = entry.get("provenance") if kind(document) == "teacher" and isinstance(entry, dict) else None
    if not isinstance(provenance, dict):
        raise IntegrityError(
            f"{where}: damaged, holds no teacher's provenance; restore it from a copy of the store"
        )
    return provenance


def read_signal(document: dict[str, Any], where: str) -> tuple[FieldSpec, str, dict[str, Any]]:
    """Return spec and encoding of a signal's group, and all that it says.

    Raises
    ------
    CacheError
        If the encoding is unknown, as in a store of a newer version.
    IntegrityError
        If an entry is missing or of the wrong kind.
    """
    entry = document["attributes"].get(_KEY)
    if kind(document) != "signal" or not isinstance(entry, dict):
        raise IntegrityError(f"{where}: damaged, describes no signal; restore it from a copy of the store")
    encoding = check_signal_encoding(entry.get("encoding"), where)
    texts = {key: entry.get(key) for key in ("name", "axis", "dtype", "unit", "symmetry")}
    shape, most = entry.get("shape"), entry.get("max_per_atom", 0)
    if not all(isinstance(t, str) for t in texts.values()) or not _is_shape(shape) or type(most) is not int:
        raise IntegrityError(f"{where}: damaged description of a signal; restore it from a copy of the store")
    spec = FieldSpec(shape=tuple(shape or ()), max_per_atom=most, **texts)  # type: ignore[arg-type]  # checked above and below
    try:
        check_name(spec.name, "signal", parts=True)
        check_signal_spec(spec, encoding)
    except CacheError as error:
        raise IntegrityError(
            f"{where}: {shorten(str(error), _SHOWN)}; restore it from a copy of the store"
        ) from error
    return spec, encoding, entry


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(n) is int for n in shape)


ROOT_ATTRIBUTES = {
    _KEY: {
        "format": FORMAT,
        "about": (
            "systems: one row a system. atoms and teachers: rows of a shard's systems one after the other; "
            "rows after the last system of a shard are fill. plan.json and log/ beside this group say which "
            "shards are written."
        ),
        "chunk_rows": CHUNK_ROWS,
    }
}
