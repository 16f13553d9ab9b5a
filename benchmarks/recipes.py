"""Which recipe closes most of the gap: labels everywhere, on a tenth, and on a tenth beside a pool.

    python benchmarks/recipes.py acac tenth OUT --teacher RUN_OR_MODEL [--seeds 3] [--steps 5000] [--jobs 2]

The same command continues. Three regimes: `all` labels; a `tenth` of the labelled systems and nothing else;
the same tenth and, as `pool`, the other nine tenths without their labels. In each the teacher also labels
rattled copies of what there is, or with --only what other kinds of `kd augment` make of it. All runs of a
regime have the same student, steps and batch size. Baselines without KD are `none` and `slope`, which teaches
the energy its slope from the labelled forces, as `grad` does from the teacher's; in `pool` they would train
on what they have in `tenth`, so only `none` is made again.
Test files are never trained on, rattled, or looked at by the teacher but to measure it.
Writes OUT/CASE-REGIME.yaml, a study, and runs it: `kd study` shows its state, tables are in
OUT/CASE-REGIME/report.
Needs the data sets beside the checkout (../shared/data).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase.io
import yaml
from gap_closed import DATA, KD, output

REGIMES = ("all", "tenth", "pool")
FEATURES = ("node", "v2v")
SHARE = 0.5  # of them in each batch
SLOPE = 3.0  # weight of `grad` in the recipe
TENTH = 10
# --only has others: n2n+v2v, grad, unfaded (what `auto` is, to the end), and auto+KIND for each of `kinds`;
# auto+adversarial wants runs of none
STRATEGIES = {
    "all": ("none", "slope", "auto", "rattled", "auto+rattled"),
    "tenth": ("none", "slope", "auto", "rattled", "auto+rattled"),
    "pool": ("none", "auto", "rattled", "auto+rattled", "pseudo"),
}


@dataclass(frozen=True)
class Case:
    """A data set with how long and how students are trained on it."""

    folder: str
    train: str
    val: str
    tests: tuple[str, ...]
    licence: str
    steps: dict[str, int]  # by regime
    batch_size: int
    sigma: float  # A, of the rattling
    settings: dict[str, Any] = field(default_factory=dict)
    copies: tuple[int, int, int] = (3, 20, 3)  # rattled ones of each system, by regime as in REGIMES
    teacher: Path | None = None  # one that is at hand


CASES = {
    "ethanol": Case(
        "rmd17-ethanol", "train", "val", ("test",), "MIT",
        {"all": 10_000, "tenth": 4_000, "pool": 5_000}, 8, 0.03,
        teacher=DATA / "painn-rmd17-ethanol-weights" / "painn_1.npz",
    ),
    "acac": Case(
        "acac", "train_300K", "val_300K", ("test_300K", "test_600K"), "MIT",
        {"all": 8_000, "tenth": 4_000, "pool": 4_000}, 8, 0.03,
    ),
    "coll-gfn2": Case(
        "coll-gfn2", "train", "val", ("test", "test_ood_hot", "test_ood_new_molecules"), "CC0-1.0",
        {"all": 3_000, "tenth": 3_000, "pool": 2_500}, 8, 0.03, copies=(1, 20, 1),
    ),
    "oc20like-nrr": Case(
        "oc20like-nrr", "train", "val_id", ("test_id", "test_ood_ads", "test_ood_cat", "test_ood_both"),
        "not settled: internal use only",
        {"all": 1_500, "tenth": 700, "pool": 700}, 4, 0.03,
        # Adsorption energies need no references; 16 neighbors are those of the teacher.
        {"training.references": "none", "training.normalization": "energy", "training.forces_weight": 30,
         "training.lr": 5e-3, "model.max_neighbors": 16},
        copies=(1, 10, 1),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("regime", choices=REGIMES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", help="model file or run folder; ethanol has its own")
    parser.add_argument("--student", default="painn-tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", nargs="+", help="strategies")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, more settings of every run")
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"skipped: the data sets are not at {DATA}")
    case = CASES[args.case]
    teacher = args.teacher or case.teacher
    if teacher is None:
        sys.exit("--teacher: train one with kd train-student --kd none")
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{args.case}-{args.regime}"
    chosen = args.only or STRATEGIES[args.regime]
    stores = prepare(case, args.regime, args.out / name, str(teacher), chosen)
    study = args.out / f"{name}.yaml"
    content = describe(args, case, name, stores, str(teacher), chosen)
    study.write_text(yaml.safe_dump(content, sort_keys=False))
    more = [word for text in args.set for word in ("--set", f"set.{text}")]
    run([*KD, "study", study, "--jobs", args.jobs, "--threads", 1, *more])


def prepare(case: Case, regime: str, folder: Path, teacher: str, chosen: Sequence[str]) -> dict[str, Path]:
    """Make the store of the regime, `data`, and those of new structures, all with the teacher's signals."""
    folder.mkdir(exist_ok=True)
    stores = {"data": folder / "data.kdcache"}
    files = {"labelled": folder / "labelled.extxyz", "pool": folder / "pool.extxyz"}
    source = DATA / case.folder / f"{case.train}.extxyz"
    if regime != "all" and not files["pool"].exists():
        frames = ase.io.read(source, ":")
        ase.io.write(files["labelled"], frames[::TENTH])  # spread over the file
        ase.io.write(files["pool"], [f for i, f in enumerate(frames) if i % TENTH])
    data = [source] if regime == "all" else [files["labelled"]]
    pool: list[object] = ["--drop-labels", files["pool"]] if regime == "pool" else []
    run([*KD, "ingest", *data, stores["data"], "--licence", case.licence, *pool])
    offered = set(json.loads(output([*KD, "teacher", "info", teacher, "--json"]))["signals"])
    signals = ["energy", "forces", "atomic_energies", *(s for s in FEATURES if s in offered)]
    of_teacher = ["--teacher", teacher, "--name", "teacher", "--signals", ",".join(signals)]
    run([*KD, "cache-teacher", stores["data"], *of_teacher])
    n_systems = json.loads(output([*KD, "cache", "info", stores["data"], "--json"]))["systems"]
    copies = case.copies[REGIMES.index(regime)]
    for kind, how in kinds(case, n_systems, copies, folder).items():
        if any(kind == name.removeprefix("auto+") for name in chosen):
            stores[kind] = folder / f"{kind}.kdcache"
            run([*KD, "augment", how[0], stores["data"], stores[kind], *of_teacher, *how[1:]])
    return stores


def kinds(case: Case, n_systems: int, copies: int, folder: Path) -> dict[str, list[object]]:
    """Return how new structures are made, about `copies` of each system in every way."""
    n = n_systems * copies
    student = folder / "runs" / "teacher-to-painn-tiny" / "none" / "seed0"
    return {
        "rattled": ["rattle", "--sigma", case.sigma, "--copies", copies],
        "rattled-0.1": ["rattle", "--sigma", 0.1, "--copies", copies],
        "adversarial": ["adversarial", "--student", student, "--n", n],
        "relaxed": ["molecules", "--n", n // 4, "--frames", 4],
        "dynamics": ["molecules", "--n", n // 20, "--frames", 20, "--temperature", 500, "--md-steps", 400],
    }


def describe(
    args: argparse.Namespace,
    case: Case,
    name: str,
    stores: dict[str, Path],
    teacher: str,
    chosen: Sequence[str],
) -> dict[str, Any]:
    """Return the study."""
    folder = (DATA / case.folder).resolve()
    mixed = {kind: [{"store": str(path.resolve()), "share": SHARE}] for kind, path in stores.items()}
    del mixed["data"]
    strategies: dict[str, Any] = {
        "none": [],
        "slope": {"set": {"training.gradient_weight": SLOPE}},
        "n2n+v2v": ["n2n", "v2v"],
        "grad": f"grad={SLOPE:g}",
        "unfaded": [f"grad={SLOPE:g}", "n2n", "v2v"],
        "auto": "auto",
        "pseudo": {"set": {"pseudo_labels": True}},
        **{kind: {"set": {"pseudo_labels": True, "mix": mix}} for kind, mix in mixed.items()},
        **{f"auto+{kind}": {"kd": "auto", "set": {"mix": mix}} for kind, mix in mixed.items()},
    }
    return {
        "name": name,
        "store": str(stores["data"].resolve()),
        "teachers": {"teacher": {"model": str(Path(teacher).resolve())}},
        "pairs": [{"teacher": "teacher", "student": args.student}],
        "strategies": {name: strategies[name] for name in strategies if name in chosen},
        "seeds": args.seeds,
        "steps": args.steps or case.steps[args.regime],
        "set": {"training.batch_size": case.batch_size, **case.settings},
        "val": str(folder / f"{case.val}.extxyz"),
        "test": {test: str(folder / f"{test}.extxyz") for test in case.tests},
    }


def run(command: list[object]) -> None:
    """Run a command of ours on one thread; stop if it fails."""
    words = [str(word) for word in command]
    print(" ".join(words[3:]), flush=True)
    done = subprocess.run(words, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
