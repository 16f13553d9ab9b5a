"""Seconds of a training step: without KD, with KD from the cache, with the teacher in the loop (the old way).

    OMP_NUM_THREADS=1 python benchmarks/kd_step.py [--batch-size 8] [--rounds 8] [--steps 40]
        [--pair gemnet-oc-oc20:painn-big-oc20:n2n,e2n,v2v ...] [--data FILE]

A pair is TEACHER:STUDENT:LOSSES with presets of random weights (speed does not depend on them); without any,
PaiNN-big teaches PaiNN-small and SchNet (COLL). Without data the molecules bundled for the demo are taken.
The three variants see the same batches and take turns, a round of some steps each; a round is everything from
asking for its first batch to its last updated weights, so what a variant reads ahead is paid by itself but
for the few batches in its queue. Ratios are medians over rounds, each divided by the round without KD that
stands beside it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch

from molkd.cache_schema.reader import Cache
from molkd.pipeline.allocator import keep_freed_memory
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, IngestConfig, KDTerm, TrainConfig, make_config
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.distill.loader import Sample
from molkd.pipeline.distill.step import initial_state, train_step
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.graphs.batch import Batch, make_batch
from molkd.pipeline.ingest import ingest
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model, load_preset
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher

PAIRS = ("painn-big-coll:painn-small-coll:n2n,v2v", "painn-big-coll:schnet-coll:n2n")
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--pair", action="append", help="TEACHER:STUDENT:LOSSES; several can be given")
    parser.add_argument(
        "--data", type=Path, default=Path(str(files("molkd.pipeline.demo") / "train.extxyz.xz"))
    )
    args = parser.parse_args()
    keep_freed_memory()
    for pair in args.pair or PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            teacher, student, losses = pair.split(":")
            terms = tuple(KDTerm(name=name) for name in losses.split(","))
            store, teacher_file = prepare_store(Path(folder), args.data, teacher, terms)
            result = measure(student, terms, store, teacher_file, args)
            print(json.dumps({pair: result}, indent=2), flush=True)


def prepare_store(folder: Path, data: Path, teacher: str, terms: tuple[KDTerm, ...]) -> tuple[Path, Path]:
    """Cache a preset with random weights over the data."""
    torch.manual_seed(0)
    store, file = folder / "store.kdcache", folder / "teacher.safetensors"
    ingest(IngestConfig(data=(data,), store=store))
    with Cache.open(store) as cache:
        model = load_preset(teacher, periodic=bool(cache.pbc.any()))["model"]
    Potential(build_model(model), LabelScale(), {"model": model}).save(file)
    signals = tuple({signal for term in terms for signal in term.signals})
    cache_teacher(CacheConfig(store=store, teacher=str(file), signals=signals))
    return store, file


def measure(
    student: str, terms: tuple[KDTerm, ...], store: Path, teacher_file: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Time the three variants in turns and return medians."""
    teacher, batch_size = load_teacher(str(teacher_file), device=CPU), args.batch_size
    steps = {
        "without KD": variant(student, store, (), batch_size),
        "KD from the cache": variant(student, store, terms, batch_size),
        "KD online": variant(student, store, terms, batch_size, teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    waited: dict[str, list[float]] = {name: [] for name in steps}  # share of a round
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            waits = sum(step() for _ in range(args.steps))
            took = time.perf_counter() - began
            if round_ > 0:  # the first round warms up
                seconds[name].append(took / args.steps)
                waited[name].append(waits / took)
    result = {f"{name}, ms": 1e3 * statistics.median(times) for name, times in seconds.items()}
    base, cached, online = seconds.values()
    result["cached / without"] = statistics.median(c / b for c, b in zip(cached, base, strict=True))
    result["online / cached"] = statistics.median(o / c for o, c in zip(online, cached, strict=True))
    result["waiting for data from the cache, %"] = 100 * statistics.median(waited["KD from the cache"])
    result["share of the online step saved, %"] = 100 * (1 - 1 / result["online / cached"])
    return result


def rebuilt(batch: Batch, teacher: Teacher) -> Batch:
    """Return the systems of a batch with the teacher's own edges."""
    return make_batch(
        atomic_numbers=batch.atomic_numbers.numpy(),
        positions=batch.positions.numpy(),
        n_atoms=batch.atoms_ptr.diff().numpy(),
        cell=batch.cell.numpy(),
        pbc=batch.pbc.numpy(),
        tags=batch.tags.numpy(),
        fixed=batch.fixed.numpy(),
        rule=teacher.neighbor_rule,
    )


def variant(
    student: str, store: Path, terms: tuple[KDTerm, ...], batch_size: int, teacher: Teacher | None = None
) -> Callable[[], float]:
    """Return a function that takes one step on the next batch and returns the seconds it waited for it."""
    cache = Cache.open(store)
    config = make_config(
        TrainConfig,
        load_preset(student, periodic=bool(cache.pbc.any())),
        {"training": {"batch_size": batch_size}, "student": student, "kd": terms},
        {"store": store, "out": store.parent / "unused", "val_fraction": 0.0, "device": "cpu"},
    )
    state = initial_state(cache, prepare(cache, config, CPU), config, CPU)
    if teacher is not None:
        state.loader.signals = ()
    samples = iter(state.loader)
    wanted = tuple(signal for term in terms for signal in term.signals)

    def step() -> float:
        began = time.perf_counter()
        sample: Sample = next(samples)
        waited = time.perf_counter() - began
        if teacher is not None:
            signals = teacher.compute(rebuilt(sample.batch, teacher), wanted)
            sample = sample._replace(targets=sample.targets._replace(teacher=signals))
        train_step(state, sample, config, CPU, total_steps=1_000_000)
        state.step += 1
        return waited

    return step


if __name__ == "__main__":
    main()
