"""Forecast against reality: what `kd cache plan` said of a run of stage one, and what the run took.

    OMP_NUM_THREADS=1 python benchmarks/forecast.py [CASE ...] [--repeats 3]

A case is DATA:PRESET:SIGNALS[:ENCODING], teachers with random weights; without any, those of this file on the
sets beside the checkout. The store is made first, so both numbers are of the signals alone. Ratios are those
of the forecast to reality; each repeat plans and runs anew. Sizes are those of all files that the run added.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from stage_one import random_teacher

from molkd.cache_schema.untrusted import n_bytes_below
from molkd.pipeline.allocator import keep_freed_memory
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, IngestConfig
from molkd.pipeline.ingest import ingest
from molkd.pipeline.planning import plan_teacher

SHARED = Path(__file__).parents[2] / "shared" / "data"
CASES = (
    f"{SHARED}/coll-gfn2/train.extxyz:painn-big-coll:energy,forces,atomic_energies,node,v2v",
    f"{SHARED}/coll-gfn2/val.extxyz:gemnet-oc-medium:energy,forces,node,e2n,v2v:fp16",
    f"{SHARED}/oc20like-nrr/val_id.extxyz:painn-big-oc20:energy,forces,node,v2v",
    f"{SHARED}/acac/train_300K.extxyz:gemnet-oc-small:energy,forces,node,e2n,v2v:pca:32",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.cases is CASES and not SHARED.is_dir():
        sys.exit(f"skipped: the data sets are not at {SHARED}")
    keep_freed_memory()
    for case in args.cases:
        data, preset, signals, *encoding = case.split(":", 3)
        found = [
            run(Path(data), preset, tuple(signals.split(",")), tuple(encoding)) for _ in range(args.repeats)
        ]
        n_bytes, seconds, size, pace = (statistics.median(column) for column in zip(*found, strict=True))
        spread = [ratio for *_, ratio in found]
        print(
            f"{Path(data).parent.name}/{Path(data).name} {preset} {signals} {''.join(encoding)}: "
            f"{n_bytes / 1e6:.1f} MB, {seconds:.1f} s; forecast over it: size {size:.3f}, "
            f"time {pace:.2f} ({min(spread):.2f} to {max(spread):.2f})",
            flush=True,
        )


def run(
    data: Path, preset: str, signals: tuple[str, ...], encoding: tuple[str, ...]
) -> tuple[float, float, float, float]:
    """Return bytes and seconds of a run, and the forecast's over these."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        store = folder / "store.kdcache"
        ingest(IngestConfig(data=(data,), store=store))
        teacher = random_teacher(folder / "teacher.safetensors", preset, folder)
        config = CacheConfig(
            store=store, teacher=str(teacher), signals=signals, encoding=encoding, device="cpu"
        )
        said = plan_teacher(config, store)
        before, began = n_bytes_below(store), time.perf_counter()
        cache_teacher(config)
        seconds = time.perf_counter() - began
        n_bytes = n_bytes_below(store) - before
        shutil.rmtree(store)
    return n_bytes, seconds, said.total_bytes / n_bytes, said.seconds / seconds


if __name__ == "__main__":
    main()
