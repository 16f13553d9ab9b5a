"""Reading a store of int8 features: against memcpy, the disk, pickled LMDB records, and zarr-python.

    OMP_NUM_THREADS=1 python benchmarks/read.py FOLDER [--systems 26000] [--repeats 3] [--skip lmdb zarr]

Makes FOLDER/made-up.kdcache (systems of 75 atoms; node 256, v2v 3 x 256 in int8; 2 GB for 26,000) and
FOLDER/*.lmdb with one pickled PyG record of float32 tensors a system, as OC20's files are and fairchem reads
them (8 and 2 GB). Everything on one core, batches of 32; the readers take turns, figures are medians. Warm:
an epoch after the first, which compares the checksums. Cold: the files were dropped from the page cache and
opened anew, checksums included. The disk itself is read by O_DIRECT in turns with an epoch, each with half of
the shards. LMDB is credited with reading and unpickling alone, without making a batch of the records; its
readahead is on, as in fairchem.
"""

import argparse
import mmap
import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np
import torch
import zarr
from made_up_store import TEACHER, make_store
from torch_geometric.data import Data

from molkd.cache_schema.epoch import iterate_epoch, read_epoch
from molkd.cache_schema.reader import Cache
from molkd.pipeline.allocator import keep_freed_memory

FIELDS = ("atomic_numbers", "positions", "tags", "fixed", "cell", "pbc", "energy", "forces")
SETS = {"node + v2v": ("node", "v2v"), "node": ("node",)}
BATCH = 32


class Opened:
    """The store, opened anew after `forget`."""

    def __init__(self, path: Path) -> None:
        self.path, self.cache = path, Cache.open(path)

    def forget(self) -> None:
        """Open it again, without what was checked and cached."""
        self.cache.close()
        self.cache = Cache.open(self.path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--systems", type=int, default=26_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=["lmdb", "zarr", "cold"])
    args = parser.parse_args()
    keep_freed_memory()
    args.folder.mkdir(parents=True, exist_ok=True)
    store = args.folder / "made-up.kdcache"
    make_store(store, args.systems)
    opened = Opened(store)
    print(f"memcpy {memcpy() / 1e9:.1f} GB/s")
    for name, signals in SETS.items():
        rivals: dict[str, Callable[[], Iterator[tuple[int, int]]]] = {
            "epoch": lambda signals=signals: epoch(opened, signals)
        }
        limits = {"epoch": None}
        if "zarr" not in args.skip:
            rivals |= {
                "random batches": lambda signals=signals: random_batches(opened, signals),
                "zarr-python, random batches": lambda signals=signals: stock(store, signals),
            }
            limits |= {"random batches": 200, "zarr-python, random batches": 4}
        if "lmdb" not in args.skip:
            path = args.folder / f"{'-'.join(signals)}.lmdb"
            write_lmdb(store, signals, path)
            rivals["LMDB"] = lambda path=path: records(path)
            limits["LMDB"] = 2_000 // BATCH
        for state in ("warm", *(() if "cold" in args.skip else ("cold",))):
            measure(name, state, rivals, limits, opened, args.repeats)
        if "cold" not in args.skip:
            against_disk(opened, signals, 4)


def measure(
    name: str,
    state: str,
    rivals: dict[str, Callable[[], Iterator[tuple[int, int]]]],
    limits: dict[str, int | None],
    opened: Opened,
    repeats: int,
) -> None:
    """Let the readers take turns and print their medians and ratios."""
    rates: dict[str, list[dict[str, float]]] = {rival: [] for rival in rivals}
    for _ in range(repeats):
        copy = memcpy()
        for rival, read in rivals.items():
            if state == "cold":
                drop(opened.path.parent)
                opened.forget()
            else:
                exhaust(read(), limits[rival])
            before, cpu, began = bytes_from_disk(), time.process_time(), time.perf_counter()
            n_systems, n_bytes = exhaust(read(), limits[rival])
            seconds = time.perf_counter() - began
            rates[rival].append(
                {
                    "systems/s": n_systems / seconds,
                    "MB/s": n_bytes / seconds / 1e6,
                    "CPU ms/system": 1e3 * (time.process_time() - cpu) / n_systems,
                    "of memcpy": n_bytes / seconds / copy,
                    "read/used": (bytes_from_disk() - before) / n_bytes,
                }
            )
    print(f"\n{name}, {state}")
    for rival, found in rates.items():
        medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
        spread = [one["systems/s"] for one in found]
        print(
            f"  {rival:<28}"
            + "  ".join(f"{key} {value:.3g}" for key, value in medians.items())
            + f"  ({min(spread):.0f} to {max(spread):.0f} systems/s)"
        )
    for ours, other in (("epoch", "LMDB"), ("random batches", "zarr-python, random batches")):
        if other in rates:
            pairs = zip(rates[ours], rates[other], strict=True)
            ratios = [a["systems/s"] / b["systems/s"] for a, b in pairs]
            print(f"  {ours} over {other}: {statistics.median(ratios):.3g} times the systems/s")


def exhaust(items: Iterator[tuple[int, int]], limit: int | None) -> tuple[int, int]:
    """Return the sums over an iterator, or its first items."""
    total = np.zeros(2, dtype=np.int64)
    for pair in islice(items, limit):
        total += pair
    return int(total[0]), int(total[1])


def epoch(
    opened: Opened, signals: tuple[str, ...], subset: np.ndarray | None = None
) -> Iterator[tuple[int, int]]:
    """Shuffled batches as training reads them, not decoded."""
    plan = iterate_epoch(opened.cache, subset=subset, batch_size=BATCH, seed=0, epoch=0)
    batches = read_epoch(opened.cache, plan, fields=FIELDS, teacher=TEACHER, signals=signals, decode=False)
    for indices, arrays in batches:
        yield len(indices), sum(a.nbytes for a in arrays.values())


def random_batches(opened: Opened, signals: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Any systems of the store together."""
    order, cache = np.random.default_rng(0), opened.cache
    while True:
        indices = order.integers(0, cache.n_systems, BATCH)
        arrays = cache.read(indices, FIELDS, TEACHER, signals, decode=False)
        yield BATCH, sum(a.nbytes for a in arrays.values())


def stock(store: Path, signals: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Random batches through zarr-python alone: one slice a system and array."""
    root = zarr.open_group(store / "data.zarr", mode="r")
    rows, n_atoms = root["systems/row"][:], root["systems/n_atoms"][:]
    names = [f"atoms/{n}" for n in ("atomic_numbers", "positions", "forces", "tags", "fixed")]
    names += [f"teachers/{TEACHER}/{s}/{part}" for s in signals for part in ("values", "scale")]
    arrays = [root[name] for name in names]
    order = np.random.default_rng(0)
    while True:
        indices = order.integers(0, len(rows), BATCH)
        parts = [a[int(rows[i]) : int(rows[i] + n_atoms[i])] for a in arrays for i in indices]
        yield BATCH, sum(p.nbytes for p in parts)


def write_lmdb(store: Path, signals: tuple[str, ...], path: Path) -> None:
    """Write records as OC20's LMDBs hold them."""
    if path.exists():
        return
    with (
        Cache.open(store) as cache,
        lmdb.open(str(path), subdir=False, map_size=1 << 40, meminit=False) as env,
    ):
        for i in range(cache.n_systems):
            arrays = cache.read([i], FIELDS, TEACHER, signals)
            tensors = {k.removeprefix("teacher/"): torch.from_numpy(v) for k, v in arrays.items()}
            with env.begin(write=True) as transaction:
                transaction.put(str(i).encode(), pickle.dumps(Data(**tensors), protocol=-1))


def records(path: Path) -> Iterator[tuple[int, int]]:
    """Random records, as fairchem's LmdbDataset reads them."""
    order = np.random.default_rng(0)
    with lmdb.open(
        str(path), subdir=False, readonly=True, lock=False, readahead=True, meminit=False, max_readers=1
    ) as env:
        while True:
            n_bytes = 0
            for i in order.integers(0, env.stat()["entries"], BATCH):
                with env.begin() as transaction:
                    data = pickle.loads(transaction.get(str(i).encode()))  # written above
                n_bytes += sum(t.nbytes for t in data.to_dict().values())
            yield BATCH, n_bytes


def memcpy() -> float:
    """Bytes per second of copying 64 MB."""
    source = np.ones(1 << 26, dtype=np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - began)
    return len(source) / statistics.median(seconds[1:])


def against_disk(opened: Opened, signals: tuple[str, ...], repeats: int) -> None:
    """Let an epoch and O_DIRECT take turns, cold, each with every other shard."""
    pairs = []
    for turn in range(repeats):
        drop(opened.path.parent)
        opened.forget()
        mine = opened.cache.systems.shard % 2 == turn % 2
        files = [path for s in signals for path in shard_files(opened.path, s, 1 - turn % 2)]
        if turn % 4 < 2:
            disk = direct(files)
        began = time.perf_counter()
        _, n_bytes = exhaust(epoch(opened, signals, mine), None)
        rate = n_bytes / (time.perf_counter() - began)
        if turn % 4 >= 2:
            disk = direct(files)
        pairs.append((rate, disk))
    shown = ", ".join(f"{rate / 1e9:.2f} where it gave {disk / 1e9:.2f}" for rate, disk in pairs)
    ratio = statistics.median(rate / disk for rate, disk in pairs)
    print(f"  epoch over the disk, each with half of the shards: {ratio:.2f} (GB/s: {shown})")


def shard_files(store: Path, signal: str, parity: int) -> list[Path]:
    """Return the files of a signal's codes, of the even or the odd shards."""
    shards = (store / "data.zarr" / "teachers" / TEACHER / signal / "values" / "c").iterdir()
    return [file for s in shards if int(s.name) % 2 == parity for file in s.rglob("*") if file.is_file()]


def direct(files: Iterable[Path]) -> float:
    """Bytes per second of reading files past the page cache, one after the other."""
    buffer = mmap.mmap(-1, 1 << 23)
    done, began = 0, time.perf_counter()
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        offset = 0
        while (got := os.preadv(fd, [buffer], offset)) > 0:
            offset += got
            if got < len(buffer):
                break
        os.close(fd)
        done += offset
    return done / (time.perf_counter() - began)


def drop(folder: Path) -> None:
    """Drop all files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def bytes_from_disk() -> int:
    """Return what this process has caused to be read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


if __name__ == "__main__":
    main()
