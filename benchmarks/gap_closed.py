"""Share of the gap closed: one student, each strategy, several seeds, equal budgets with and without KD.

    python benchmarks/gap_closed.py acac OUT --teacher RUN_OR_MODEL
    python benchmarks/gap_closed.py ethanol OUT
    python benchmarks/gap_closed.py ethanol-100 OUT

The same command continues. `acac` trains on train_300K and tests on test_300K and test_600K. `ethanol` uses
the published schnetpack PaiNN as teacher and all 900 labels; `ethanol-100` keeps 100 labels, the other 800
structures are only labelled by the teacher. Test files are never trained on. Needs the data sets beside the
checkout (../shared/data). Ends with `kd report` in OUT/report.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ase.io

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
KD = [sys.executable, "-m", "molkd.cli"]
SIGNALS = "energy,forces,atomic_energies,node,v2v"
STRATEGIES = {
    "none": ["--kd", "none"],
    "n2n": ["--kd", "n2n=auto"],
    "v2v": ["--kd", "v2v=auto"],
    "n2n+v2v": ["--kd", "n2n=auto", "--kd", "v2v=auto"],
    "vanilla1": ["--kd", "vanilla1=auto"],
    "vanilla2": ["--kd", "vanilla2=auto"],
}
POOL_STRATEGIES = {
    "pseudo": ["--kd", "none", "--pseudo-labels"],
    "pseudo+n2n+v2v": ["--kd", "n2n=auto", "--kd", "v2v=auto", "--pseudo-labels"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=["acac", "ethanol", "ethanol-100"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", help="model file or run folder; the ethanol cases have their own")
    parser.add_argument("--student", default="painn-tiny")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"skipped: the data sets are not at {DATA}")

    args.out.mkdir(parents=True, exist_ok=True)
    store, val, tests, teacher = prepare(args)
    run([*KD, "cache-teacher", store, "--teacher", teacher, "--signals", SIGNALS, "--name", "teacher"])
    strategies = STRATEGIES | (POOL_STRATEGIES if args.case == "ethanol-100" else {})
    commands = []
    for seed in range(args.seeds):
        for name, flags in strategies.items():
            folder = args.out / "runs" / f"{name}-{seed}"
            command = [
                *KD,
                "--quiet",
                "train-student",
                store,
                "--student",
                args.student,
                *flags,
                "--val",
                val,
            ]
            command += [flag for test in tests for flag in ("--test", test)]
            command += [
                "--out",
                folder,
                "--seed",
                seed,
                "--steps",
                args.steps,
                "--epochs",
                100_000,
                "--label",
                name,
            ]
            commands.append(command)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, commands))
    runs = [args.out / "runs" / f"{name}-{seed}" for name in strategies for seed in range(args.seeds)]
    run([*KD, "report", *runs, "--out", args.out / "report", "--teacher", teacher])


def prepare(args: argparse.Namespace) -> tuple[Path, Path, list[Path], str]:
    """Make the store; return it with validation data, test data and the teacher."""
    store = args.out / "data.kdcache"
    if args.case == "acac":
        folder = DATA / "acac"
        run([*KD, "ingest", folder / "train_300K.extxyz", store, "--licence", "MIT"])
        if args.teacher is None:
            sys.exit("acac needs --teacher: train one with kd train-student --student painn-medium --kd none")
        tests = [folder / "test_300K.extxyz", folder / "test_600K.extxyz"]
        return store, folder / "val_300K.extxyz", tests, args.teacher
    folder = DATA / "rmd17-ethanol"
    teacher = args.teacher or str(DATA / "painn-rmd17-ethanol-weights" / "painn_1.npz")
    if args.case == "ethanol":
        run([*KD, "ingest", folder / "train.extxyz", store, "--licence", "MIT"])
    else:
        frames = ase.io.read(folder / "train.extxyz", ":")
        ase.io.write(args.out / "labelled.extxyz", frames[::9])  # 100 of 900, spread over the file
        ase.io.write(args.out / "pool.extxyz", [f for i, f in enumerate(frames) if i % 9])
        pool = ["--drop-labels", args.out / "pool.extxyz"]
        run([*KD, "ingest", args.out / "labelled.extxyz", store, "--licence", "MIT", *pool])
    return store, folder / "val.extxyz", [folder / "test.extxyz"], teacher


def run(command: list[object]) -> None:
    """Run a command of ours on one thread; stop at the first failure."""
    words = [str(word) for word in command]
    print(" ".join(words[3:]), flush=True)
    subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
