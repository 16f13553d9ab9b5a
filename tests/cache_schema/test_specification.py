"""docs/cache-format.md is enough to read a store: a reader written from it with the standard library."""

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest
from cache_example import TEACHER

from molkd.cache_schema.reader import Cache

SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')
TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


def crc32c(data: bytes) -> str:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return f"{crc ^ 0xFFFFFFFF:08x}"


def sealed(path: Path) -> tuple[dict, str]:
    raw = path.read_bytes()
    end = SEAL.search(raw)
    assert end[1].decode() == hashlib.sha256(raw[: end.start()]).hexdigest()
    return json.loads(raw), end[1].decode()


class SpecificationReader:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.plan, self.plan_sha256 = sealed(root / "plan.json")
        assert (self.plan["kind"], self.plan["format"]) == ("molkd cache plan", 1)
        self.S = self.plan["packing"]["n_systems"]
        for name, digest in self.plan["metadata"].items():
            assert hashlib.sha256((root / "data.zarr" / name).read_bytes()).hexdigest() == digest
        self.shard, self.row, self.slot, self.n_atoms = (
            self.column(name, code)
            for name, code in (("shard", "i"), ("row", "q"), ("slot", "q"), ("n_atoms", "i"))
        )

    def column(self, name: str, code: str) -> list:
        raw = (self.root / "data.zarr/systems" / name / "c/0").read_bytes()
        assert hashlib.sha256(raw).hexdigest() == self.plan["systems"][name]
        return list(struct.unpack(f"<{self.S}{code}", raw))

    def rows(self, group: str, array: str, i: int, axis: str, shape: tuple, code: str) -> list:
        shard, packing = self.shard[i], self.plan["packing"]
        record, _ = sealed(self.root / "log" / group / f"{shard:06d}.json")
        assert record["plan_sha256"] == self.plan_sha256
        entry = record["arrays"][array]
        raw = self.root.joinpath("data.zarr", group, array, "c", str(shard), *["0"] * len(shape)).read_bytes()
        assert (len(raw), crc32c(raw)) == (entry["bytes"], entry["crc32c"])
        width = 1
        for n in shape:
            width *= n
        row_bytes = width * struct.calcsize(f"<{code}")
        if axis == "system":
            first, n = self.slot[i] - shard * packing["systems_per_shard"], 1
        else:
            if axis == "atom":
                first, n = self.row[i] - shard * packing["rows_per_shard"], self.n_atoms[i]
                total = packing["rows_per_shard"] // 1024
            else:
                mates = [k for k in range(self.S) if self.shard[k] == shard]
                counts = [self.rows(group, "n_edges", k, "system", (), "i")[0] for k in mates]
                assert sum(counts) == entry["rows"]
                place = mates.index(i)
                first, n = sum(counts[:place]), counts[place]
                total = self.edge_room(group) // 1024
            m = -(-entry["rows"] // 1024)
            index = raw[m * 1024 * row_bytes :]
            assert struct.unpack("<I", index[-4:])[0] == int(crc32c(index[:-4]), 16)
            numbers = struct.unpack(f"<{2 * total}Q", index[:-4])
            expected = [
                (c * 1024 * row_bytes, 1024 * row_bytes) if c < m else (2**64 - 1,) * 2 for c in range(total)
            ]
            assert list(zip(numbers[::2], numbers[1::2], strict=True)) == expected
            chunks = [raw[k * 1024 * row_bytes : (k + 1) * 1024 * row_bytes] for k in range(m)]
            assert [crc32c(c) for c in chunks] == entry["chunk_crc32c"]
        return list(struct.unpack_from(f"<{n * width}{code}", raw, first * row_bytes))

    def edge_room(self, group: str) -> int:
        """Rows a shard has on the edge axis, by the formula; the array's own metadata say the same."""
        folder = self.root / "data.zarr"
        most = json.loads((folder / group / "zarr.json").read_text())["attributes"]["molkd"]["max_per_atom"]
        pbc = (folder / "systems/pbc/c/0/0").read_bytes()
        needed = [0] * self.plan["packing"]["n_shards"]
        for k in range(self.S):
            n, periodic = self.n_atoms[k], any(pbc[3 * k : 3 * k + 3])
            needed[self.shard[k]] += n * (most if periodic else min(most, n - 1))
        rows = max(1, -(-max(needed) // 1024)) * 1024
        array = json.loads((folder / group / "values/zarr.json").read_text())
        assert array["chunk_grid"]["configuration"]["chunk_shape"][0] == rows
        return rows


def test_crc32c_reference_value():
    assert crc32c(b"123456789") == "e3069283"


@pytest.mark.parametrize("i", [0, 4, 11])
def test_both_readers_agree(store_path, i):
    other, cache = SpecificationReader(store_path), Cache.open(store_path)
    ours = cache.read([i], teacher=TEACHER, signals=("node", "v2v", "energy", "edge"))
    assert other.rows("atoms", "atomic_numbers", i, "atom", (), "B") == ours["atomic_numbers"].tolist()
    assert repr(other.rows("atoms", "forces", i, "atom", (3,), "f")) == repr(ours["forces"].ravel().tolist())
    group = f"teachers/{TEACHER}"
    assert (
        other.rows(f"{group}/node", "values", i, "atom", (4,), "e") == ours["teacher/node"].ravel().tolist()
    )
    assert (
        other.rows(f"{group}/v2v", "values", i, "atom", (3, 3), "f") == ours["teacher/v2v"].ravel().tolist()
    )
    assert other.rows(f"{group}/energy", "values", i, "system", (), "d") == ours["teacher/energy"].tolist()
    for array, shape, code, name in (
        ("values", (2,), "e", ""), ("index", (2,), "i", "/index"), ("shift", (3,), "h", "/shift")
    ):  # fmt: skip
        rows = ours[f"teacher/edge{name}"]
        expected = rows.T if array == "index" else rows
        assert other.rows(f"{group}/edge", array, i, "edge", shape, code) == expected.ravel().tolist()
