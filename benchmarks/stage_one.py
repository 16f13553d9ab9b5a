"""Stage one with each set of signals: systems a second, bytes an atom, and time over the bare teacher loop.

    OMP_NUM_THREADS=1 python benchmarks/stage_one.py [--teacher FILE | --preset painn-big-coll] [--data FILE]
        [--device cpu] [--repeats 5] [--signals energy,forces,node,v2v ...]

The bare loop runs the teacher over the same batches, already built and in memory, asks it for the same
signals and throws them away. Both take turns; medians of ratios. A second call on the finished store shows
what a call costs whatever the size of the data: loading and hashing model and store. Without a teacher a
preset is taken with random weights (speed does not depend on them), without data the molecules bundled for
the demo.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from molkd.cache_schema.reader import Cache
from molkd.pipeline.allocator import keep_freed_memory
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, IngestConfig
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.device import choose_device, synchronize
from molkd.pipeline.graphs.batch import to_device
from molkd.pipeline.ingest import ingest
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model, load_preset
from molkd.pipeline.teacher_pass import Work, make_work
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher

LABELS = ("energy", "forces", "atomic_energies")
SETS = (("energy",), LABELS, (*LABELS, "node"), (*LABELS, "node", "e2n", "v2v"), (*LABELS, "node", "v2v"))
RAW = (*LABELS, "node", "edge")
BUDGETS = {"cpu": (1024, 60_000), "cuda": (16_384, 1_000_000)}  # atoms and edges a batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", help="any teacher; otherwise --preset with random weights")
    parser.add_argument("--preset", default="painn-big-coll")
    parser.add_argument("--data", type=Path, help="other structures than the bundled ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--signals", action="append", help="a set of signals; can be given several times")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = args.data or Path(str(files("molkd.pipeline.demo") / "train.extxyz.xz"))
        ingest(IngestConfig(data=(data,), store=folder / "store.kdcache"))
        spec = args.teacher or str(random_teacher(folder / "teacher.safetensors", args.preset, folder))
        teacher = load_teacher(spec, device=choose_device(args.device))
        asked = [tuple(text.split(",")) for text in args.signals or ()] or [*SETS, RAW]
        sets = [signals for signals in asked if set(signals) <= teacher.signals.keys()]
        result = {
            ",".join(signals): measure(folder, spec, teacher, signals, args.repeats) for signals in sets
        }
    print(json.dumps(result, indent=2))


def random_teacher(path: Path, preset: str, folder: Path) -> Path:
    """Save a preset's model with random weights."""
    with Cache.open(folder / "store.kdcache") as cache:
        config = load_preset(preset, periodic=bool(cache.pbc.any()))["model"]
    torch.manual_seed(0)
    Potential(build_model(config), LabelScale(), {"model": config}).save(path)
    return path


def measure(
    folder: Path, spec: str, teacher: Teacher, signals: tuple[str, ...], repeats: int
) -> dict[str, float]:
    """Time stage one and the bare loop in turns; the first turn warms up."""
    store, target = folder / "store.kdcache", folder / "copy.kdcache"
    atoms, edges = BUDGETS[teacher.device.type]
    with Cache.open(store) as cache:
        n_systems, n_atoms = cache.n_systems, cache.n_atoms
        works: list[Work] = []
        for shard in range(cache.plan.n_shards):
            systems = np.asarray(cache.systems.in_shard(shard))
            works += make_work(cache, systems, teacher.neighbor_rule, torch.float32, atoms, edges)
    bare, full, fixed = [], [], []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for work in works:
            teacher.compute(to_device(work.batch, teacher.device), signals)
        synchronize(teacher.device)
        bare.append(time.perf_counter() - began)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(store, target)
        config = CacheConfig(
            store=target, teacher=spec, name="again", signals=signals,
            batch_atoms=atoms, batch_edges=edges, device=str(teacher.device),
        )  # fmt: skip
        for seconds in (full, fixed):  # the second call finds everything done
            began = time.perf_counter()
            cache_teacher(config)
            seconds.append(time.perf_counter() - began)
    with Cache.open(target) as cache:
        entries = cache.teachers["again"].signals
        n_bytes = sum(entry.n_bytes for entry in entries.values())
        n_edges = entries["edge"].n_rows if "edge" in entries else 0
    shutil.rmtree(target)
    turns = list(zip(bare[1:], full[1:], fixed[1:], strict=True))
    return {
        "systems": n_systems,
        "atoms": n_atoms,
        "edges per atom": n_edges / n_atoms,
        "bytes per atom": n_bytes / n_atoms,
        "bare teacher loop, s": statistics.median(bare[1:]),
        "stage one, s": statistics.median(full[1:]),
        "fixed costs of a call, s": statistics.median(fixed[1:]),
        "systems per second": n_systems / statistics.median(full[1:]),
        "stage one / bare": statistics.median(f / b for b, f, _ in turns),
        "without the fixed costs": statistics.median((f - x) / b for b, f, x in turns),
    }


if __name__ == "__main__":
    main()
