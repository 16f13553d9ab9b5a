"""Ways to make a store hostile: one thing of it is changed, and what is sealed is sealed correctly again.

Each takes what is to be changed, then the store and a folder outside of it.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import socket
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from molkd.cache_schema import jsonfile
from molkd.cache_schema.crc import crc32c, crc_hex

TERABYTES = 4 << 40
TEACHER = "data.zarr/teachers/painn"
NODE = f"{TEACHER}/node"  # int8
LAYER = f"{TEACHER}/layer/U4"  # pca
RECORD = "log/teachers/painn/node/000000.json"


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
            raw = _shard_file(data / document["group"] / name, document["shard"]).read_bytes()
            entry["bytes"], entry["crc32c"] = len(raw), crc_hex(crc32c(raw))

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
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
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
    for k in range(300):
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


def codebook(
    group: str, array: str, change: Callable[[np.ndarray], np.ndarray], store: Path, outside: Path
) -> None:
    """Another codebook with a hash that fits."""
    dtype = "uint8" if array == "bits" else "float32"
    path = _shard_file(store / group / array, 0)
    raw = change(np.fromfile(path, dtype)).astype(dtype).tobytes()
    path.write_bytes(raw)
    keys = ("attributes", "molkd", "codebook", "arrays", array, "sha256")
    edit(store / group / "zarr.json", partial(_set, keys, hashlib.sha256(raw).hexdigest()))
    adopt(store)


def claim_basis(n_channels: int, store: Path, outside: Path) -> None:
    """A rotation that is all holes, of very many channels, with a hash that fits."""
    path = _shard_file(store / LAYER / "basis", 0)
    path.write_bytes(b"")
    os.truncate(path, 4 * n_channels**2)
    digest = hashlib.sha256()
    for _ in range(n_channels):
        digest.update(bytes(4 * n_channels))
    shape = [n_channels, n_channels]
    edit(store / LAYER / "basis/zarr.json", lambda document: _reshape(document, shape))
    keys = ("attributes", "molkd", "codebook", "arrays", "basis")
    edit(store / LAYER / "zarr.json", partial(_set, keys, {"shape": shape, "sha256": digest.hexdigest()}))
    adopt(store)


def _reshape(document: dict[str, Any], shape: list[int]) -> None:
    document["shape"] = shape
    document["chunk_grid"]["configuration"]["chunk_shape"] = shape


def overlay(content: object, store: Path, outside: Path) -> None:
    plan, digest = jsonfile.read_sealed(store / "plan.json", max_bytes=1 << 30, remedy="")
    place = {"itself": str(store), "outside": str(outside), "device": "/dev/zero"}.get(str(content), content)
    document = {"kind": "molkd cache overlay", "format": 1, "plan_sha256": digest, "store": place}
    (store / "overlay.json").write_bytes(jsonfile.seal(document | {"fingerprint": plan["fingerprint"]}))


def stranger(name: str, store: Path, outside: Path) -> None:
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).touch()
    sparse(name, TERABYTES, store, outside)
