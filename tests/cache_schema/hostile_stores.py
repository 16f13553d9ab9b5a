"""Stores as somebody would make them who wants to harm a reader: a small store with one thing changed.

`CASES` maps a name to a function of the store and a folder outside of it. What is sealed is sealed correctly.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from molkd.cache_schema import jsonfile
from molkd.cache_schema.crc import crc32c, crc_hex

TERABYTES = 4 << 40
ATOMS_FILE = "data.zarr/atoms/positions/c/0/0"
NODE = "data.zarr/teachers/painn/node"
RECORD = "log/teachers/painn/node/000000.json"
JSON_FILES = ("plan.json", "manifest.json", RECORD, f"{NODE}/zarr.json", "data.zarr/systems/zarr.json")
LINKED = (
    "data.zarr", "data.zarr/systems", "data.zarr/systems/id/c/0/0", "data.zarr/atoms/positions",
    "data.zarr/atoms/positions/c", "data.zarr/atoms/positions/c/0", ATOMS_FILE, "data.zarr/teachers",
    "data.zarr/teachers/painn", NODE, f"{NODE}/zarr.json", f"{NODE}/values/c/0/0", f"{NODE}/step/c/0",
    "log", "log/atoms", "log/teachers", "log/teachers/painn", RECORD, "plan.json", "manifest.json",
)  # fmt: skip
# Not what the format says, yet nothing that is read depends on it.
HARMLESS = {"stranger", "temporary", "pickle beside", "nest"}

Case = Callable[[Path, Path], object]


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a sealed file and seal it again."""
    document, _ = jsonfile.read_sealed(path, max_bytes=1 << 30, remedy="")
    change(document)
    body = ("{\n" + ",\n".join(f' "{k}": {json.dumps(v)}' for k, v in sorted(document.items()))).encode()
    path.write_bytes(sealed(body))


def sealed(body: bytes) -> bytes:
    return body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def adopt(store: Path) -> None:
    """Make plan and records fit the files that are there, as who made them would; the manifest goes."""
    (store / "manifest.json").unlink(missing_ok=True)
    data = store / "data.zarr"

    def change_plan(document: dict[str, Any]) -> None:
        for name in document["systems"]:
            (path,) = (p for p in (data / "systems" / name / "c").rglob("*") if p.is_file())
            document["systems"][name] = _sha256(path)
        for name in document["metadata"]:
            document["metadata"][name] = _sha256(data / name)

    reseal(store / "plan.json", change_plan)
    _, plan_sha256 = jsonfile.read_sealed(store / "plan.json", max_bytes=1 << 30, remedy="")

    def change_record(document: dict[str, Any]) -> None:
        document["plan_sha256"] = plan_sha256
        document["metadata"] = {name: _sha256(data / name) for name in document["metadata"]}
        for name, entry in document["arrays"].items():
            file = _shard_file(data / document["group"] / name, document["shard"])
            raw = file.read_bytes() if file.stat().st_size < 1 << 24 else b""
            n_chunks = len(entry["chunk_crc32c"])
            size = (len(raw) - (len(raw) % 16 and 20)) // n_chunks if n_chunks else 0
            entry["bytes"], entry["crc32c"] = file.stat().st_size, crc_hex(crc32c(raw))
            if size and name not in ("n_edges",):
                entry["chunk_crc32c"] = [
                    crc_hex(crc32c(raw[k * size : (k + 1) * size])) for k in range(n_chunks)
                ]

    for record in (store / "log").rglob("*.json"):
        reseal(record, change_record)


def _shard_file(array: Path, shard: int) -> Path:
    path = array / "c" / str(shard)
    while path.is_dir():
        path = path / "0"
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "0" * 64


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a zarr.json; the store goes on vouching for it."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------------------------- what is done


def link_out(name: str, relative: bool, store: Path, outside: Path) -> None:
    path, elsewhere = store / name, outside / "moved"
    shutil.move(path, elsewhere)
    path.symlink_to(os.path.relpath(elsewhere, path.parent) if relative else elsewhere)


def link_to(name: str, target: str, store: Path, outside: Path) -> None:
    path = store / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


def special(name: str, kind: str, store: Path, outside: Path) -> None:
    """Put a pipe, a socket or a device where a file belongs."""
    path = store / name
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)
    elif kind == "device" and os.geteuid() == 0:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    else:
        os.mkfifo(path)


def sparse(name: str, size: int, store: Path, outside: Path) -> None:
    with (store / name).open("r+b") as handle:
        handle.truncate(size)


def set_plan(keys: tuple[str, ...], value: object, store: Path, outside: Path) -> None:
    reseal(store / "plan.json", partial(_set, keys, value))
    _follow_plan(store)


def set_record(keys: tuple[str, ...], value: object, store: Path, outside: Path) -> None:
    (store / "manifest.json").unlink()
    reseal(store / RECORD, partial(_set, keys, value))


def set_manifest(keys: tuple[str, ...], value: object, store: Path, outside: Path) -> None:
    reseal(store / "manifest.json", partial(_set, keys, value))


def set_signal(keys: tuple[str, ...], value: object, store: Path, outside: Path) -> None:
    edit(store / NODE / "zarr.json", partial(_set, ("attributes", "molkd", *keys), value))
    adopt(store)


def _set(keys: tuple[str, ...], value: object, document: dict[str, Any]) -> None:
    for key in keys[:-1]:
        document = document[key]
    document[keys[-1]] = value


def _follow_plan(store: Path) -> None:
    """Let records and manifest name the plan that is there now."""
    _, digest = jsonfile.read_sealed(store / "plan.json", max_bytes=1 << 30, remedy="")
    for path in [*(store / "log").rglob("*.json"), store / "manifest.json"]:
        reseal(path, lambda document: document.update(plan_sha256=digest))


def write_json(name: str, body: bytes, store: Path, outside: Path) -> None:
    """Replace a JSON file by other text; a sealed one is sealed."""
    path = store / name
    path.write_bytes(body if name.endswith("zarr.json") else sealed(body))
    if name != RECORD and name.endswith("zarr.json"):
        with contextlib.suppress(OSError, ValueError):
            adopt(store)


def odd_json(name: str, change: Callable[[bytes], bytes], store: Path, outside: Path) -> None:
    """Change the text of a JSON file, not its structure."""
    path = store / name
    raw = path.read_bytes()
    if name.endswith("zarr.json"):
        path.write_bytes(change(raw))
        adopt(store)
    else:
        path.write_bytes(sealed(change(raw[: raw.rindex(b',\n "sha256"')])))
        if name == RECORD:
            (store / "manifest.json").unlink()


def set_table(name: str, dtype: str, value: object, store: Path, outside: Path) -> None:
    """Give the first system another number, and seal the plan anew."""
    (path,) = (p for p in (store / "data.zarr/systems" / name / "c").rglob("*") if p.is_file())
    values = np.fromfile(path, dtype)
    values[0] = value
    values.tofile(path)
    adopt(store)


def claim_systems(n_systems: int, store: Path, outside: Path) -> None:
    """A table that is all holes, of very many systems."""
    for folder in (store / "data.zarr/systems").iterdir():
        if folder.is_dir():
            (path,) = (p for p in (folder / "c").rglob("*") if p.is_file())
            with path.open("r+b") as handle:
                handle.truncate(path.stat().st_size // 5 * n_systems)
    set_plan(("packing", "n_systems"), n_systems, store, outside)


def nest(name: str, store: Path, outside: Path) -> None:
    """Folders in folders, deeper than a path may be long."""
    here = Path.cwd()
    os.chdir(store / name)
    for _ in range(2100):
        Path("d").mkdir()
        os.chdir("d")
    os.chdir(here)


def crowd(store: Path, outside: Path) -> None:
    for k in range(3000):
        (store / "log/teachers/painn" / f"s{k}").mkdir()


class Payload:
    """Whoever unpickles this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}/pwned",)


def put_pickle(name: str, store: Path, outside: Path) -> None:
    (store / name).write_bytes(pickle.dumps(Payload(outside)))
    if name.startswith("data.zarr/"):
        adopt(store)


def codebook(array: str, change: Callable[[np.ndarray], np.ndarray], store: Path, outside: Path) -> None:
    """Another codebook with a hash that fits."""
    dtype = "uint8" if array == "bits" else "float32"
    path = _shard_file(store / NODE / array, 0)
    raw = change(np.fromfile(path, dtype)).astype(dtype).tobytes()
    path.write_bytes(raw)
    keys = ("attributes", "molkd", "codebook", "arrays", array, "sha256")
    edit(store / NODE / "zarr.json", partial(_set, keys, hashlib.sha256(raw).hexdigest()))
    adopt(store)


def overlay(content: object, store: Path, outside: Path) -> None:
    plan, digest = jsonfile.read_sealed(store / "plan.json", max_bytes=1 << 30, remedy="")
    place = {"itself": str(store), "outside": str(outside), "device": "/dev/zero"}.get(str(content), content)
    document = {"kind": "molkd cache overlay", "format": 1, "plan_sha256": digest, "store": place}
    (store / "overlay.json").write_bytes(jsonfile.seal(document | {"fingerprint": plan["fingerprint"]}))


def stranger(name: str, store: Path, outside: Path) -> None:
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).touch()
    sparse(name, TERABYTES, store, outside)


# ------------------------------------------------------------------------------------------------- all cases


def _cases() -> Iterator[tuple[str, Case]]:
    for name in LINKED:
        for relative in (False, True):
            yield f"link {'..' if relative else '/'} {name}", partial(link_out, name, relative)
    for name in ("log/teachers", "data.zarr/teachers/painn", ATOMS_FILE, RECORD, f"{NODE}/step/c/0"):
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
    for name in ("log/teachers/painn", "data.zarr/teachers/painn", "data.zarr/atoms"):
        yield f"nest {name}", partial(nest, name)
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
    nan = partial(np.full_like, fill_value=np.nan)
    for array, change in (("step", nan), ("step", np.negative), ("step", lambda a: a * 0), ("mean", nan)):
        yield f"codebook {array} {id(change) % 97}", partial(codebook, array, change)
    yield "codebook longer", partial(codebook, "step", lambda a: np.tile(a, 1000))


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
    for value in ([1 << 20], [1 << 40], [-1], [True], [1.5], [[]], "4", None, [2] * 40, [1 << 18, 3]):
        yield f"signal shape {value!r:.14}", partial(set_signal, ("shape",), value)
    for key, value in (
        ("name", "../../evil"), ("name", "/etc"), ("axis", "edge"), ("axis", "bond"), ("dtype", "object"),
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


CASES: dict[str, Case] = dict(_cases())
