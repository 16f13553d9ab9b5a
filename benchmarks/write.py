"""Writing a store: CPU a GB, beside a raw file and zarr-python, beside a teacher, from several processes.

    OMP_NUM_THREADS=1 python benchmarks/write.py FOLDER [--gigabytes 1] [--repeats 5] [--processes 2]

Rows are int8 node (256) and v2v (3 x 256) with their scales, as they come from a device. Writers end with
their data on the disk (fsync). The raw file is written in pieces of the same size, without checksums. The
teacher is a loop that waits as for a GPU and hands each step's rows (75 systems of 75 atoms) to the writing
thread of stage one; its rate makes 80 MB/s of signals. Medians; ratios of neighbouring turns.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from made_up_store import NODE, TEACHER, V2V, codebook

from molkd.cache_schema.layout import SCALE
from molkd.cache_schema.shard_writer import ShardWriter
from molkd.cache_schema.writer import Store, create_store
from molkd.pipeline.prefetch import Background
from molkd.pipeline.shard_output import Written, commit

SPECS = (NODE, V2V)
CHANNELS = NODE.shape[0]
ROW_BYTES = 4 * CHANNELS + 4
STEP_ROWS = 75 * 75
RATE = 80e6  # bytes a second of signals
QUEUE = 3
SHARDS = 8  # of the loop: 0.5 GB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    n_systems = int(args.gigabytes * 1e9 / ROW_BYTES / 75)
    path = args.folder / "written.kdcache"
    writers: dict[str, Callable[[], float]] = {
        "this": partial(ours, path, n_systems),
        "raw file": partial(raw, args.folder / "raw", n_systems),
        "zarr-python": partial(stock, args.folder / "stock.zarr", n_systems),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    for _ in range(args.repeats):
        for name, write in writers.items():
            cpu = time.process_time()
            n_bytes, seconds = timed(write)
            found[name].append((n_bytes / seconds / 1e6, (time.process_time() - cpu) / n_bytes * 1e9))
    print(f"{args.gigabytes} GB in one process")
    for name, pairs in found.items():
        rate, cpu = (statistics.median(p[k] for p in pairs) for k in (0, 1))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found["this"], pairs, strict=True))
        print(f"  {name:<12} {rate:7.0f} MB/s  {cpu:.2f} CPU s/GB   this over it {ratio:.2f}")
    alone, with_writer = [], []
    for _ in range(args.repeats):
        store = new_store(path, n_systems)
        alone.append(loop(store, write=False))
        with_writer.append(loop(store, write=True))
    slower = [b / a - 1 for a, b in zip(alone, with_writer, strict=True)]
    print(f"teacher loop at {RATE / 1e6:.0f} MB/s slower by {100 * statistics.median(slower):.2f} % "
          f"({100 * min(slower):.2f} to {100 * max(slower):.2f})")  # fmt: skip
    rates = {}
    for n in range(1, args.processes + 1):
        new_store(path, n_systems)
        began = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=fill, args=(path, k, n)) for k in range(n)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rates[n] = n_systems * 75 * ROW_BYTES / (time.perf_counter() - began) / 1e6
    print("processes: " + ", ".join(f"{n}: {rate:.0f} MB/s" for n, rate in rates.items()))
    for name in ("written.kdcache", "stock.zarr"):
        shutil.rmtree(args.folder / name, ignore_errors=True)
    (args.folder / "raw").unlink(missing_ok=True)


def timed(write: Callable[[], float]) -> tuple[float, float]:
    """Return bytes written and seconds."""
    began = time.perf_counter()
    n_bytes = write()
    return n_bytes, time.perf_counter() - began


def rows_of(n: int) -> list[dict[str, np.ndarray]]:
    """Return n rows of each signal, as stored."""
    noise = np.random.default_rng(0).integers(-127, 128, (n, 3, CHANNELS), dtype=np.int8)
    scale = np.ones(n, np.float16)
    return [{"values": np.ascontiguousarray(noise[:, 0]), SCALE: scale}, {"values": noise, SCALE: scale}]


def new_store(path: Path, n_systems: int) -> Store:
    """Make an empty store with room for both signals."""
    shutil.rmtree(path, ignore_errors=True)
    rng = np.random.default_rng(0)
    store = create_store(
        path,
        ids=rng.integers(0, 256, (n_systems, 16), dtype=np.uint8),
        n_atoms=np.full(n_systems, 75),
        energy=np.zeros(n_systems),
        cell=np.zeros((n_systems, 3, 3)),
        pbc=np.zeros((n_systems, 3), dtype=bool),
        source=np.zeros(n_systems, dtype=int),
        source_row=np.arange(n_systems),
        source_names=["made up"],
        dataset={},
    )
    store.add_teacher(TEACHER, {"weights_sha256": "0" * 64})
    for spec in SPECS:
        store.add_signal(TEACHER, spec, "int8", codebook(spec))
    return store


def groups() -> list[str]:
    """Return the names of the signals' groups."""
    return [f"teachers/{TEACHER}/{spec.name}" for spec in SPECS]


def ours(path: Path, n_systems: int) -> float:
    """Write all shards."""
    return write_shards(new_store(path, n_systems), 0, 1)


def write_shards(store: Store, first: int, stride: int) -> float:
    """Write every n-th shard; return the bytes."""
    pieces, n_bytes = rows_of(STEP_ROWS), 0.0
    for shard in range(first, store.plan.n_shards, stride):
        left = store.systems.rows_in_shard(shard)
        with ExitStack() as stack:
            writers = [stack.enter_context(store.shard_writer(group, shard)) for group in groups()]
            while left:
                n = min(left, STEP_ROWS)
                append(writers, pieces, n)
                left -= n
                n_bytes += n * ROW_BYTES
    return n_bytes


def append(writers: list[ShardWriter], pieces: list[dict[str, np.ndarray]], n: int) -> None:
    """Append n rows to both signals."""
    for writer, piece in zip(writers, pieces, strict=True):
        writer.write_narrowed({name: rows[:n] for name, rows in piece.items()}, {})


def fill(path: Path, first: int, stride: int) -> None:
    """Write a share of the shards, as a process of its own."""
    write_shards(Store.open(path, mode="a"), first, stride)


def raw(path: Path, n_systems: int) -> float:
    """Write the same bytes into one file."""
    data = [array for piece in rows_of(STEP_ROWS) for array in piece.values()]
    left = n_systems * 75
    with path.open("wb", buffering=0) as file:
        while left > 0:
            n = min(left, STEP_ROWS)
            for array in data:
                file.write(array[:n].reshape(-1).view(np.uint8).data)
            left -= n
        os.fsync(file.fileno())
    return n_systems * 75 * ROW_BYTES


def stock(path: Path, n_systems: int) -> float:
    """Write the same arrays with zarr-python, sharded alike, a whole shard at a time."""
    shutil.rmtree(path, ignore_errors=True)
    root, rows = zarr.open_group(path, mode="w"), 65_536
    n_shards = -(-n_systems * 75 // rows)
    pieces = rows_of(rows)
    for name, piece in zip(("node", "v2v"), pieces, strict=True):
        for part, values in piece.items():
            array = root.create_array(
                f"{name}/{part}",
                shape=(n_shards * rows, *values.shape[1:]),
                shards=(rows, *values.shape[1:]),
                chunks=(1024, *values.shape[1:]),
                dtype=values.dtype,
                compressors=None,
            )
            for shard in range(n_shards):
                array[shard * rows : (shard + 1) * rows] = values
    for file in path.rglob("c/**/*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    return n_shards * rows * ROW_BYTES


def loop(store: Store, *, write: bool) -> float:
    """Wait as for a device, step by step; if asked, hand the rows of each to the writing thread.

    Returns
    -------
    float
        seconds until the last step is computed; the files are finished after that
    """
    pool = [rows_of(STEP_ROWS) for _ in range(QUEUE + 2)]  # a device's copy engine fills them by itself
    step = 0
    with Background("kd-write", QUEUE) as writing:
        began = time.perf_counter()
        for shard in range(min(store.plan.n_shards, SHARDS)):
            left = store.systems.rows_in_shard(shard)
            writers = {g: store.shard_writer(g, shard).__enter__() for g in groups()} if write else {}
            while left:
                n = min(left, STEP_ROWS)
                time.sleep(n * ROW_BYTES / RATE)
                if write:
                    rows, step = pool[step % len(pool)], step + 1
                    writing.submit(partial(append, list(writers.values()), rows, n))
                left -= n
            if write:
                writing.submit(partial(commit, writers, Written()))
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
