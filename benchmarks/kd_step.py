"""Seconds of a training step: without KD, with KD from the cache, with the teacher in the loop (the old way).

    OMP_NUM_THREADS=1 python benchmarks/kd_step.py [--batch-size 8] [--rounds 8] [--steps 40]
        [--pair gemnet-oc-oc20:painn-big-oc20:n2n,e2n,v2v ...] [--data FILE] [--device cuda] [--amp bf16]

A pair is TEACHER:STUDENT:LOSSES with presets of random weights (speed does not depend on them); without any,
PaiNN-big teaches PaiNN-small and SchNet (COLL). Without data the molecules bundled for the demo are taken.
The three variants see the same batches and take turns, a round of some steps each; a round is everything from
asking for its first batch to its last updated weights, so what a variant reads ahead is paid by itself but
for the few batches in its queue. Ratios are medians over rounds, each divided by the round without KD that
stands beside it. The teacher's neighbours, where it is in the loop, are found ahead of the step as well.
On a GPU a round ends when the device is done.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import torch

from molkd.cache_schema.reader import Cache
from molkd.pipeline.allocator import keep_freed_memory
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, IngestConfig, KDTerm, TrainConfig, make_config
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.device import choose_device, synchronize
from molkd.pipeline.distill.loader import Sample
from molkd.pipeline.distill.step import initial_state, train_step
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.graphs.batch import Batch, make_batch, to_device
from molkd.pipeline.ingest import ingest
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model, load_preset
from molkd.pipeline.prefetch import prefetch
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher
from molkd.pipeline.transfer import pin

PAIRS = ("painn-big-coll:painn-small-coll:n2n,v2v", "painn-big-coll:schnet-coll:n2n")
AHEAD = 4  # batches that wait with the teacher's neighbours


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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="precision of the student")
    args = parser.parse_args()
    keep_freed_memory()
    for pair in args.pair or PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            teacher, student, losses = pair.split(":")
            terms = tuple(KDTerm(name=name) for name in losses.split(","))
            store, teacher_file = prepare_store(Path(folder), args.data, teacher, terms, args.device)
            result = measure(student, terms, store, teacher_file, args)
            print(json.dumps({pair: result}, indent=2), flush=True)


def prepare_store(
    folder: Path, data: Path, teacher: str, terms: tuple[KDTerm, ...], device: str
) -> tuple[Path, Path]:
    """Cache a preset with random weights over the data."""
    torch.manual_seed(0)
    store, file = folder / "store.kdcache", folder / "teacher.safetensors"
    ingest(IngestConfig(data=(data,), store=store))
    with Cache.open(store) as cache:
        model = load_preset(teacher, periodic=bool(cache.pbc.any()))["model"]
    Potential(build_model(model), LabelScale(), {"model": model}).save(file)
    signals = tuple({signal for term in terms for signal in term.signals})
    cache_teacher(CacheConfig(store=store, teacher=str(file), signals=signals, device=device))
    return store, file


def measure(
    student: str, terms: tuple[KDTerm, ...], store: Path, teacher_file: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Time the three variants in turns and return medians."""
    device = choose_device(args.device)
    teacher = load_teacher(str(teacher_file), device=device)
    steps = {
        "without KD": variant(student, store, (), args),
        "KD from the cache": variant(student, store, terms, args),
        "KD online": variant(student, store, terms, args, teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    waited: dict[str, list[float]] = {name: [] for name in steps}  # share of a round
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            synchronize(device)
            began = time.perf_counter()
            waits = sum(step() for _ in range(args.steps))
            synchronize(device)
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


def with_graphs(samples: Iterator[Sample], teacher: Teacher | None) -> Iterator[tuple[Sample, Batch | None]]:
    """Put the teacher's batches beside the student's, made ahead of the step by another thread."""
    if teacher is None:
        return ((sample, None) for sample in samples)
    graphs = ((sample, rebuilt(sample.batch, teacher)) for sample in samples)
    if teacher.device.type == "cuda":
        graphs = ((sample, pin(graph)) for sample, graph in graphs)
    return prefetch(graphs, AHEAD)


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
    student: str,
    store: Path,
    terms: tuple[KDTerm, ...],
    args: argparse.Namespace,
    teacher: Teacher | None = None,
) -> Callable[[], float]:
    """Return a function that takes one step on the next batch and returns the seconds it waited for it."""
    cache = Cache.open(store)
    config = make_config(
        TrainConfig,
        load_preset(student, periodic=bool(cache.pbc.any())),
        {"training": {"batch_size": args.batch_size}, "student": student, "kd": terms},
        {"store": store, "out": store.parent / "unused", "val_fraction": 0.0, "device": args.device},
        {"amp": args.amp},
    )
    device = choose_device(args.device)
    state = initial_state(cache, prepare(cache, config, device), config, device)
    if teacher is not None:
        state.loader.signals = ()
    samples = with_graphs(iter(state.loader), teacher)
    wanted = tuple(signal for term in terms for signal in term.signals)

    def step() -> float:
        began = time.perf_counter()
        sample, graph = next(samples)
        waited = time.perf_counter() - began
        if teacher is not None and graph is not None:
            signals = teacher.compute(to_device(graph, device), wanted)
            sample = sample._replace(targets=sample.targets._replace(teacher=signals))
        train_step(state, sample, config, device, total_steps=1_000_000)
        state.step += 1
        return waited

    return step


if __name__ == "__main__":
    main()
