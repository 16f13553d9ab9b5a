"""Stores as somebody would make them who wants to harm a reader: a small store with one thing changed.

`cases` yields (name, maker) pairs. A maker takes the store that `hostile_attempts.make_victim` wrote, or a
copy of it, and an empty folder beside it, and changes the store in place; what is moved out of the store goes
into that folder. `hostile_attempts.attempt` tries everything on one of them in a child with little memory.
For test_hostile.py and benchmarks/fault_campaign.py, which puts this folder on sys.path: these modules
import each other by name.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from hostile_edits import (
    LAYER,
    NODE,
    RECORD,
    TEACHER,
    TERABYTES,
    claim_basis,
    claim_systems,
    codebook,
    crowd,
    link_out,
    link_to,
    nest,
    odd_json,
    overlay,
    put_pickle,
    set_manifest,
    set_plan,
    set_record,
    set_signal,
    set_table,
    sparse,
    special,
    stranger,
    write_json,
)

ATOMS_FILE = "data.zarr/atoms/positions/c/0/0"
JSON_FILES = ("plan.json", "manifest.json", RECORD, f"{NODE}/zarr.json", "data.zarr/systems/zarr.json")
LINKED = (
    "data.zarr", "data.zarr/systems", "data.zarr/systems/id/c/0/0", "data.zarr/atoms/positions",
    "data.zarr/atoms/positions/c", "data.zarr/atoms/positions/c/0", ATOMS_FILE, "data.zarr/teachers",
    TEACHER, NODE, f"{NODE}/zarr.json", f"{NODE}/values/c/0/0", f"{NODE}/step/c/0",
    "log", "log/atoms", "log/teachers", "log/teachers/painn", RECORD, "plan.json", "manifest.json",
)  # fmt: skip
# Not what the format says, yet nothing that is read depends on it.
HARMLESS = {"stranger", "temporary", "pickle beside", "nest"}

Case = Callable[[Path, Path], object]


def cases() -> Iterator[tuple[str, Case]]:
    """Yield the name of each hostile store and what makes it of a store that is as it should be."""
    for name in LINKED:
        for relative in (False, True):
            yield f"link {'..' if relative else '/'} {name}", partial(link_out, name, relative)
    for name in ("log/teachers", TEACHER, ATOMS_FILE, RECORD, f"{NODE}/step/c/0"):
        for target in ("/", "/dev/zero", "/proc/self/mem", name.rsplit("/", 1)[-1], "."):
            yield f"link {name} -> {target}", partial(link_to, name, target)
    for name in (*JSON_FILES, ATOMS_FILE, "data.zarr/systems/id/c/0/0", f"{NODE}/step/c/0", "log/atoms"):
        for kind in ("pipe", "socket", "device"):
            yield f"{kind} {name}", partial(special, name, kind)
    for name in (*JSON_FILES, ATOMS_FILE, "data.zarr/systems/id/c/0/0", f"{NODE}/step/c/0"):
        yield f"sparse {name}", partial(sparse, name, TERABYTES)
    yield from _numbers()
    yield from _texts()
    for n in (1 << 26, 1 << 31):
        yield f"claim {n} systems", partial(claim_systems, n)
    yield "nest data.zarr/atoms", partial(nest, "data.zarr/atoms")
    yield "nest log/teachers/painn", partial(nest, "log/teachers/painn")
    yield "stranger crowd", crowd
    for name in ("plan.json", "manifest.json", RECORD, ATOMS_FILE, f"{NODE}/values/c/0/0"):
        yield f"pickle {name}", partial(put_pickle, name)
    for name in ("data.zarr/object.npy", "molkd.py", "data.zarr/sitecustomize.py"):
        yield f"pickle beside {name}", partial(put_pickle, name)
    for name in ("data.zarr/atoms/positions/c/9/0", "data.zarr/x", "log/atoms/000999.json", "values.npy"):
        yield f"stranger {name}", partial(stranger, name)
    for name in (".tmp-vm-1-ab", "data.zarr/.tmp-vm-1-ab", f"{NODE}/.tmp-vm-1-ab"):
        yield f"temporary {name}", partial(special, name, "pipe")
    for place in ("itself", "outside", "device", "", 7, ["x"], "../../..", "s3://", "x" * 5000):
        yield f"overlay {str(place)[:20]!r}", partial(overlay, place)
    yield from _codebooks()


def _codebooks() -> Iterator[tuple[str, Case]]:
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "NaN": lambda array: array * np.nan,
        "negative": np.negative,
        "zero": np.zeros_like,
        "infinite": lambda array: array + np.inf,
        "longer": lambda array: np.tile(array, 1000),
        "empty": lambda array: array[:0],
    }
    for what, change in changes.items():
        yield f"codebook step {what}", partial(codebook, NODE, "step", change)
        if what != "negative":  # which is another rotation
            yield f"codebook basis {what}", partial(codebook, LAYER, "basis", change)
    yield "codebook mean NaN", partial(codebook, NODE, "mean", changes["NaN"])
    for bits in (0, 1, 7, 16, 255):
        yield (
            f"codebook bits {bits}",
            partial(codebook, LAYER, "bits", partial(np.full_like, fill_value=bits)),
        )
    yield "codebook basis sheared", partial(codebook, LAYER, "basis", lambda array: array + 0.5)
    for n_channels in (8192, 8193):
        yield f"codebook claim {n_channels}", partial(claim_basis, n_channels)


def _numbers() -> Iterator[tuple[str, Case]]:
    absurd = (0, -1, True, 1.5, "3", None, [], {}, 1 << 31, 1 << 62, 1 << 200)
    for k, key in enumerate(("n_systems", "n_atoms", "n_shards", "rows_per_shard", "systems_per_shard")):
        for value in absurd[k % 3 :: 2]:
            yield f"plan {key} {value!r:.12}", partial(set_plan, ("packing", key), value)
    for key, value in (("format", True), ("format", 2), ("format", 1 << 90), ("kind", "x" * 100_000)):
        yield f"plan {key} {str(value)[:12]}", partial(set_plan, (key,), value)
    for key, value in (
        ("seed", -1),
        ("fingerprint", "../x"),
        ("systems", {}),
        ("metadata", {"../../x": "0" * 64}),
    ):
        yield f"plan {key} {value!r:.12}", partial(set_plan, (key,), value)
    yield "plan metadata /etc/passwd", partial(set_plan, ("metadata", "/etc/passwd"), "0" * 64)
    for key in ("bytes", "rows", "crc32c", "chunk_crc32c"):
        for value in (-1, True, 1 << 62, [["0"] * 10], "0" * 9):
            yield f"record {key} {value!r:.12}", partial(set_record, ("arrays", "values", key), value)
    sums = ("arrays", "values", "sums")
    for key, value in (
        ("count", -1),
        ("sum", [1e999]),
        ("sum", [0] * 100_000),
        ("max_abs", "x"),
        ("sum_squares", {}),
    ):
        yield f"record {key} {value!r:.12}", partial(set_record, (*sums, key), value)
    for value in (-1, True, 1 << 40, "0", list(range(100_000))):
        bad = value if isinstance(value, list) else [value]
        yield f"record bad_systems {value!r:.12}", partial(set_record, ("bad_systems",), bad)
        yield f"record shard {value!r:.12}", partial(set_record, ("shard",), value if value != "0" else "0")
    yield "record metadata ..", partial(set_record, ("metadata",), {"../../x/zarr.json": "0" * 64})
    for key in ("../../x", "teachers/../../x/y", "teachers/painn/" + "a/" * 50, "teachers/painn/none", ""):
        yield f"manifest group {key!r:.20}", partial(set_manifest, ("groups", key), {"metadata": {}})
    node = ("groups", "teachers/painn/node")
    for key, value in (("arrays", {}), ("arrays", []), ("bad_systems", [-1]), ("metadata", {"x": "y"})):
        yield f"manifest {key} {value!r:.12}", partial(set_manifest, (*node, key), value)
    yield "manifest shards", partial(set_manifest, (*node, "arrays", "values", "shards"), [{}] * 50_000)
    for value in ([1 << 20], [1 << 40], [-1], [True], [[]], "4", None, [2] * 40, [1] * 5000, [1 << 18, 3]):
        yield f"signal shape {value!r:.14}", partial(set_signal, ("shape",), value)
    for key, value in (
        ("name", "../../evil"), ("name", "/etc"), ("name", "x" * 50_000), ("axis", "edge"),
        ("axis", "bond" * 5000), ("dtype", "object"),
        ("encoding", "pca:99999"), ("encoding", "pca:1"), ("encoding", "pickle"), ("encoding", ["int8"]),
        ("max_per_atom", 1 << 40), ("symmetry", {}), ("unit", "x" * 200_000), ("codebook", None),
        ("recoded_from", "x"), ("kind", "teacher"),
    ):  # fmt: skip
        yield f"signal {key} {value!r:.14}", partial(set_signal, (key,), value)
    shape = ("codebook", "arrays", "step", "shape")
    for value in ([1 << 20], [1 << 40], [0], [-4], [4, 4], [True], "4"):
        yield f"codebook shape {value!r:.14}", partial(set_signal, shape, value)
    yield "codebook systems", partial(set_signal, ("codebook", "systems"), "all")
    yield (
        "codebook array",
        partial(set_signal, ("codebook", "arrays", "../../x"), {"shape": [1], "sha256": "0" * 64}),
    )
    for name, dtype, value in (
        ("n_atoms", "<i4", 0), ("n_atoms", "<i4", -5), ("n_atoms", "<i4", 2**31 - 1),
        ("n_atoms", "<i4", 1025), ("shard", "<i4", -1), ("row", "<i8", 1 << 62), ("slot", "<i8", -1),
        ("source", "<i4", 7),
        ("source", "<i4", -1), ("pbc", "u1", 2), ("id", "u1", 255),
    ):  # fmt: skip
        yield f"table {name} {value}", partial(set_table, name, dtype, value)


def _texts() -> Iterator[tuple[str, Case]]:
    deep = b'{"a":' + b"[" * 200_000 + b"]" * 200_000
    wide = b'{"a":[' + b"{}," * 1_300_000 + b"{}]"
    long_number = b'{"a": 1' + b"0" * 20_000
    for name in JSON_FILES:
        for what, body in (("deep", deep), ("wide", wide), ("long number", long_number), ("list", b'["x"')):
            end = b"}" if name.endswith("zarr.json") else b""
            yield f"json {what} {name}", partial(write_json, name, body + end)
        changes: dict[str, Callable[[bytes], bytes]] = {
            "twice": lambda raw: raw.replace(b"{", b'{ "kind": 1, "kind": 2,', 1),
            "NaN": lambda raw: raw.replace(b"{", b'{ "x": NaN,', 1),
            "Infinity": lambda raw: raw.replace(b"{", b'{ "x": -Infinity,', 1),
            "utf-16": lambda raw: raw.decode().encode("utf-16"),
            "not utf-8": lambda raw: raw.replace(b"{", b'{ "x": "\xff\xfe",', 1),
            "surrogate": lambda raw: raw.replace(b"{", b'{ "x": "\\ud800",', 1),
            "mark": lambda raw: b"\xef\xbb\xbf" + raw,
            "huge": lambda raw: raw.replace(b"{", b"{" + b" " * (48 << 20), 1),
        }
        for what, change in changes.items():
            yield f"json {what} {name}", partial(odd_json, name, change)
