"""Opening a large store: seconds and memory, and the memory that an epoch takes.

    python benchmarks/opening.py FOLDER [--systems 2000000] [--repeats 5]

Makes FOLDER/large.kdcache, systems of 75 atoms with node (8) and v2v (3 x 8) in int8 (10 GB for two millions;
opening does not depend on the width of features). Each opening is a fresh process, warm: plan, systems table
and manifest are in the page cache. Memory is what the process holds beyond what it held after the imports,
mapped files left out: right after opening, and the peak over 2,000 shuffled batches of 32.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from made_up_store import TEACHER, make_store

from molkd.cache_schema.epoch import iterate_epoch, read_epoch
from molkd.cache_schema.fields import node_spec, v2v_spec
from molkd.cache_schema.reader import Cache

FIELDS = ("atomic_numbers", "positions", "tags", "fixed", "cell", "pbc", "energy", "forces")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--systems", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    store = args.folder / "large.kdcache"
    if args.child:
        print(json.dumps(opened(store)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    make_store(store, args.systems, specs=(node_spec(8), v2v_spec(8)))
    command = [sys.executable, __file__, str(args.folder), "--child"]
    found = [json.loads(subprocess.check_output(command)) for _ in range(args.repeats)]
    for key in found[0]:
        values = [one[key] for one in found]
        print(f"{key}: {statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})")


def opened(store: Path) -> dict[str, float]:
    """Open the store and read from it."""
    before, began = memory(), time.perf_counter()
    with Cache.open(store) as cache:
        seconds = time.perf_counter() - began
        holds, peak = memory() - before, 0.0
        plan = iterate_epoch(cache, batch_size=32, seed=0, epoch=0)
        batches = read_epoch(
            cache, plan, fields=FIELDS, teacher=TEACHER, signals=("node", "v2v"), decode=False
        )
        for number, _ in zip(range(2_000), batches, strict=False):
            if number % 10 == 0:
                peak = max(peak, memory() - before)
    return {"opened in s": seconds, "memory after opening, MB": holds, "peak in the epoch, MB": peak}


def memory() -> float:
    """Return the anonymous memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


if __name__ == "__main__":
    main()
