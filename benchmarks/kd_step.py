"""Seconds of a training step: without KD, with KD from the cache, with the teacher in the loop (the old way).

    OMP_NUM_THREADS=1 python benchmarks/kd_step.py [--batch-size 8] [--rounds 8]

Students PaiNN-small and SchNet, teacher PaiNN-big (COLL presets, random weights: speed does not depend on
them) on the molecules bundled for the demo. The three variants see the same batches and take turns, a round
of 40 steps each; a round is everything from asking for its first batch to its last updated weights, so what a
variant reads ahead is paid by itself but for the few batches in its queue. Ratios are medians over rounds,
each divided by the round without KD that stands beside it.
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

STUDENTS = {"painn-small-coll": ("n2n", "v2v"), "schnet-coll": ("n2n",)}
TEACHER = "painn-big-coll"
CPU = torch.device("cpu")
STEPS = 40  # a round


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8, help="rounds of 40 steps a variant")
    args = parser.parse_args()
    keep_freed_memory()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        store, teacher_file = prepare_store(Path(folder))
        for student, losses in STUDENTS.items():
            results[student] = measure(student, losses, store, teacher_file, args.batch_size, args.rounds)
    print(json.dumps(results, indent=2))


def prepare_store(folder: Path, data: Path | None = None) -> tuple[Path, Path]:
    """Cache a PaiNN-big with random weights over the demo's molecules, or over other data."""
    torch.manual_seed(0)
    preset = load_preset(TEACHER, periodic=False)
    teacher = Potential(build_model(preset["model"]), LabelScale(), {"model": preset["model"]})
    teacher.save(folder / "teacher.safetensors")
    store = folder / "store.kdcache"
    data = data or Path(str(files("molkd.pipeline.demo") / "train.extxyz.xz"))
    ingest(IngestConfig(data=(data,), store=store))
    signals = ("energy", "forces", "node", "v2v")
    cache_teacher(CacheConfig(store=store, teacher=str(folder / "teacher.safetensors"), signals=signals))
    return store, folder / "teacher.safetensors"


def measure(
    student: str, losses: tuple[str, ...], store: Path, teacher_file: Path, batch_size: int, rounds: int
) -> dict[str, float]:
    """Time the three variants in turns and return medians."""
    teacher = load_teacher(str(teacher_file), device=CPU)
    terms = tuple(KDTerm(name=name) for name in losses)
    steps = {
        "without KD": variant(student, store, (), batch_size),
        "KD from the cache": variant(student, store, terms, batch_size),
        "KD online": variant(student, store, terms, batch_size, teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            if round_ > 0:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / STEPS)
    result = {f"{name}, ms": 1e3 * statistics.median(times) for name, times in seconds.items()}
    base, cached, online = seconds.values()
    result["cached / without"] = statistics.median(c / b for c, b in zip(cached, base, strict=True))
    result["online / cached"] = statistics.median(o / c for o, c in zip(online, cached, strict=True))
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
) -> Callable[[], None]:
    """Return a function that takes one training step on the next batch."""
    config = make_config(
        TrainConfig,
        load_preset(student, periodic=False),
        {"training": {"batch_size": batch_size}, "student": student, "kd": terms},
        {"store": store, "out": store.parent / "unused", "val_fraction": 0.0, "device": "cpu"},
    )
    cache = Cache.open(store)
    state = initial_state(cache, prepare(cache, config, CPU), config, CPU)
    if teacher is not None:
        state.loader.signals = ()
    samples = iter(state.loader)
    wanted = tuple(signal for term in terms for signal in term.signals)

    def step() -> None:
        sample: Sample = next(samples)
        if teacher is not None:
            signals = teacher.compute(rebuilt(sample.batch, teacher), wanted)
            sample = sample._replace(targets=sample.targets._replace(teacher=signals))
        train_step(state, sample, config, CPU, total_steps=1_000_000)
        state.step += 1

    return step


if __name__ == "__main__":
    main()
