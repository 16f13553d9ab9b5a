"""Share of the gap closed: one student, each strategy, several seeds, equal budgets with and without KD.

    python benchmarks/gap_closed.py acac OUT --teacher RUN_OR_MODEL [--set model.max_neighbors=20 ...]
    python benchmarks/gap_closed.py oc20like-nrr OUT --teacher RUN_OR_MODEL
    python benchmarks/gap_closed.py pt-co OUT --teacher RUN_OR_MODEL
    python benchmarks/gap_closed.py ethanol OUT
    python benchmarks/gap_closed.py ethanol-100 OUT

The same command continues. Every strategy that the teacher has signals for is run. `acac` trains on
train_300K and tests on test_300K and test_600K; `ethanol` uses the published schnetpack PaiNN as teacher and
all 900 labels; `ethanol-100` keeps 100 labels, the other 800 structures are only labelled by the teacher.
Test files are never trained on. Needs the data sets beside the checkout (../shared/data). Ends with
`kd report` in OUT/report; a run that failed (diverged) is named and left out.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ase.io

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
KD = [sys.executable, "-m", "molkd.cli"]
STRATEGIES = {  # name: losses, and the teacher's features they need
    "none": ([], set()),
    "n2n": (["n2n"], {"node"}),
    "e2n": (["e2n"], {"e2n"}),
    "v2v": (["v2v"], {"v2v"}),
    "e2e": (["e2e"], {"edge"}),
    "n2n+v2v": (["n2n", "v2v"], {"node", "v2v"}),
    "vanilla1": (["vanilla1"], set()),
    "vanilla2": (["vanilla2"], set()),
}
FILES = {  # case: folder, training, validation, test files, licence
    "acac": ("acac", "train_300K", "val_300K", ("test_300K", "test_600K"), "MIT"),
    "oc20like-nrr": (
        "oc20like-nrr",
        "train",
        "val_id",
        ("test_id", "test_ood_ads", "test_ood_cat", "test_ood_both"),
        "",
    ),
    "pt-co": (
        "pt-co",
        "train",
        "val",
        ("test", "test_ood_pt553", "test_ood_pt557", "test_ood_pt111_island10"),
        "",
    ),
    "ethanol": ("rmd17-ethanol", "train", "val", ("test",), "MIT"),
    "ethanol-100": ("rmd17-ethanol", "train", "val", ("test",), "MIT"),
}
ETHANOL_TEACHER = DATA / "painn-rmd17-ethanol-weights" / "painn_1.npz"
# OC20's labels are adsorption energies: they need no references.
SETTINGS = {"oc20like-nrr": ["training.references=none", "training.normalization=energy"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=FILES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", help="model file or run folder; the ethanol cases have their own")
    parser.add_argument("--student", default="painn-tiny")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*STRATEGIES, "pseudo", "pseudo+n2n+v2v"])
    parser.add_argument("--set", action="append", default=[], help="more settings, for every run alike")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"skipped: the data sets are not at {DATA}")
    is_ethanol = args.case.startswith("ethanol")
    teacher = args.teacher or (str(ETHANOL_TEACHER) if is_ethanol else None)
    if teacher is None:
        sys.exit("--teacher: train one with kd train-student --kd none")

    args.out.mkdir(parents=True, exist_ok=True)
    store = prepare(args.case, args.out)
    offered = set(json.loads(output([*KD, "teacher", "info", teacher, "--json"]))["signals"])
    chosen = {name: losses for name, (losses, needed) in STRATEGIES.items() if needed <= offered}
    signals = {"energy", "forces", "atomic_energies"}.union(*(STRATEGIES[name][1] for name in chosen))
    command = [*KD, "cache-teacher", store, "--teacher", teacher, "--name", "teacher"]
    run([*command, "--signals", ",".join(sorted(signals))])

    flags = {
        name: [word for loss in losses or ["none"] for word in ("--kd", loss)]
        for name, losses in chosen.items()
    }
    if args.case == "ethanol-100":
        flags["pseudo+n2n+v2v"] = [*flags["n2n+v2v"], "--pseudo-labels"]
        flags["pseudo"] = ["--kd", "none", "--pseudo-labels"]
    flags = {name: value for name, value in flags.items() if args.only is None or name in args.only}
    runs = {
        args.out / "runs" / f"{name}-{seed}": train(args, store, name, value, seed)
        for seed in range(args.seeds)
        for name, value in flags.items()
    }
    with ThreadPoolExecutor(args.jobs) as pool:
        finished = list(pool.map(succeeds, runs.values()))
    sound = sorted(run for run, ok in zip(runs, finished, strict=True) if ok)
    run([*KD, "report", *sound, "--out", args.out / "report", "--teacher", teacher])
    for failed in sorted(set(runs) - set(sound)):
        print(f"left out, it failed: {failed}")


def train(args: argparse.Namespace, store: Path, name: str, flags: list[str], seed: int) -> list[object]:
    """Return the command of one run."""
    folder, _, val, tests, _ = FILES[args.case]
    command: list[object] = [*KD, "--quiet", "train-student", store, "--student", args.student, *flags]
    command += ["--val", DATA / folder / f"{val}.extxyz"]
    for test in tests:
        command += ["--test", DATA / folder / f"{test}.extxyz"]
    for setting in [*SETTINGS.get(args.case, []), *args.set]:
        command += ["--set", setting]
    command += ["--out", args.out / "runs" / f"{name}-{seed}", "--seed", seed, "--label", name]
    return [*command, "--steps", args.steps, "--batch-size", args.batch_size, "--epochs", 100_000]


def prepare(case: str, out: Path) -> Path:
    """Make the store."""
    folder, training, _, _, licence = FILES[case]
    store, data = out / "data.kdcache", [DATA / folder / f"{training}.extxyz"]
    pool: list[object] = []
    if case == "ethanol-100":
        frames = ase.io.read(data[0], ":")
        data = [out / "labelled.extxyz"]
        ase.io.write(data[0], frames[::9])  # 100 of 900, spread over the file
        ase.io.write(out / "pool.extxyz", [f for i, f in enumerate(frames) if i % 9])
        pool = ["--drop-labels", out / "pool.extxyz"]
    run([*KD, "ingest", *data, store, "--licence", licence, *pool])
    return store


def run(command: list[object]) -> None:
    """Run a command of ours on one thread; stop if it fails."""
    if not succeeds(command):
        sys.exit(1)


def succeeds(command: list[object]) -> bool:
    """Run a command of ours on one thread and say whether it succeeded."""
    words = [str(word) for word in command]
    print(" ".join(words[3:]), flush=True)
    return subprocess.run(words, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0


def output(command: list[object]) -> str:
    """Return what a command of ours prints."""
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
