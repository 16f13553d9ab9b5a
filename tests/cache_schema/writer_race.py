"""Two processes write the same shard at the same moment, many times.

    python writer_race.py FOLDER ROUNDS same|different locks|no-locks

Prints JSON, a list of rounds: what each process said ("" for success) and what the store then holds.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from cache_example import create, make_example, shard_arrays

from molkd.cache_schema import shard_writer
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store

os.fsync = lambda fd: None


def write(store: Store, example, change: float, ready: int, go: int) -> str:
    arrays = shard_arrays(store, example, "atoms", 0)
    arrays["forces"] = np.nan_to_num(arrays["forces"]) + np.float32(change)
    writer = store.shard_writer("atoms", 0)
    try:
        with writer:
            writer.write(arrays)
            os.write(ready, b".")
            os.read(go, 1)
    except CacheError as error:
        return str(error)
    return ""


def main() -> None:
    folder, rounds, values, locks = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    if locks == "no-locks":
        shard_writer.exclusive = lambda folder: contextlib.nullcontext()
    example = make_example([300, 20, 900], seed=2)
    results = []
    for number in range(rounds):
        store = create(folder / f"{number}.kdcache", example)
        ready, go, said = os.pipe(), os.pipe(), [os.pipe(), os.pipe()]
        children = []
        for k in range(2):
            pid = os.fork()
            if pid == 0:
                change = float(k) if values == "different" else 0.0
                os.write(said[k][1], write(store, example, change, ready[1], go[0]).encode())
                os._exit(0)
            children.append(pid)
        for _ in children:
            os.read(ready[0], 1)
        os.write(go[1], b"..")
        for pid in children:
            os.waitpid(pid, 0)
        for pipe in said:
            os.close(pipe[1])
        messages = [os.read(pipe[0], 10_000).decode() for pipe in said]
        report = verify(store.path)
        results.append(
            {
                "messages": messages,
                "committed": 0 not in store.missing_shards("atoms"),
                "damage": [str(p) for p in report.problems],
                "temporary": sum(n.kind == "temporary" for n in report.notes),
            }
        )
        for fd in (*ready, *go, *(pipe[0] for pipe in said)):
            os.close(fd)
    json.dump(results, sys.stdout)


main()
