"""Stage one over the bare teacher loop: what reading, neighbours, checking, encoding and writing add.

    OMP_NUM_THREADS=1 python benchmarks/stage_one.py [--repeats 5] [--data FILE]

The bare loop runs the teacher over the same batches, already built and in memory, and throws its output
away. Teacher: PaiNN-big (COLL preset, random weights) on the molecules bundled for the demo, signals energy,
forces, atomic_energies, node, v2v in float16. Both take turns; medians of ratios. A second call on the
finished store shows what a call costs whatever the size of the data: loading and hashing model and store.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from kd_step import prepare_store

from molkd.cache_schema.reader import Cache
from molkd.pipeline.allocator import keep_freed_memory
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.teacher_pass import Work, make_work
from molkd.pipeline.teachers.load import load_teacher

SIGNALS = ("energy", "forces", "atomic_energies", "node", "v2v")
BATCH_ATOMS, BATCH_EDGES = 1024, 60_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="other structures than the bundled ones")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, teacher_file = prepare_store(folder, args.data)
        teacher = load_teacher(str(teacher_file), device="cpu")
        cache = Cache.open(store)
        works: list[Work] = []
        for shard in range(cache.plan.n_shards):
            systems = np.asarray(cache.systems.in_shard(shard))
            works += make_work(cache, systems, teacher.neighbor_rule, torch.float32, BATCH_ATOMS, BATCH_EDGES)
        bare, full, fixed = [], [], []
        for repeat in range(args.repeats + 1):
            began = time.perf_counter()
            for work in works:
                teacher.compute(work.batch, SIGNALS)
            bare.append(time.perf_counter() - began)
            target = folder / f"copy{repeat}.kdcache"
            shutil.copytree(store, target)
            config = CacheConfig(
                store=target, teacher=str(teacher_file), name="again", signals=SIGNALS,
                batch_atoms=BATCH_ATOMS, batch_edges=BATCH_EDGES, device="cpu",
            )  # fmt: skip
            for seconds in (full, fixed):  # the second call finds everything done
                began = time.perf_counter()
                cache_teacher(config)
                seconds.append(time.perf_counter() - began)
            shutil.rmtree(target)
    result = {
        "systems": cache.n_systems,
        "atoms": cache.n_atoms,
        "bare teacher loop, s": statistics.median(bare[1:]),
        "stage one, s": statistics.median(full[1:]),
        "fixed costs of a call, s": statistics.median(fixed[1:]),
        "stage one / bare": statistics.median(f / b for f, b in zip(full[1:], bare[1:], strict=True)),
        "without the fixed costs": statistics.median(
            (f - x) / b for f, x, b in zip(full[1:], fixed[1:], bare[1:], strict=True)
        ),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
