"""Share of the gap closed: one student, each strategy, several seeds, equal budgets with and without KD.

    python benchmarks/gap_closed.py acac OUT --teacher RUN_OR_MODEL [--set model.max_neighbors=20 ...]
    python benchmarks/gap_closed.py oc20like-nrr OUT --teacher RUN_OR_MODEL
    python benchmarks/gap_closed.py pt-co OUT --teacher RUN_OR_MODEL
    python benchmarks/gap_closed.py ethanol OUT
    python benchmarks/gap_closed.py ethanol-100 OUT

The same command continues. Every strategy that the teacher has signals for is run. `acac` trains on
train_300K and tests on test_300K and test_600K; `ethanol` uses the published schnetpack PaiNN as teacher and
all 900 labels; `ethanol-100` keeps 100 labels, the other 800 structures are only labelled by the teacher.
Test files are never trained on. Needs the data sets beside the checkout (../shared/data). Writes
OUT/study.yaml and runs it (`kd study OUT/study.yaml --dry-run` says where it stands); tables are in
OUT/report. A run that failed (diverged) is named and left out.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ase.io
import yaml

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
SETTINGS = {"oc20like-nrr": {"training.references": "none", "training.normalization": "energy"}}


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

    offered = set(json.loads(output([*KD, "teacher", "info", teacher, "--json"]))["signals"])
    strategies: dict[str, Any] = {
        name: losses for name, (losses, needed) in STRATEGIES.items() if needed <= offered
    }
    if args.case == "ethanol-100":
        strategies["pseudo"] = {"set": {"pseudo_labels": True}}
        strategies["pseudo+n2n+v2v"] = {"kd": ["n2n", "v2v"], "set": {"pseudo_labels": True}}
    chosen = {name: what for name, what in strategies.items() if args.only is None or name in args.only}
    sys.exit(0 if make(args, args.out, chosen, teacher) else 1)


def make(
    args: argparse.Namespace,
    out: Path,
    strategies: dict[str, Any],
    teacher: str,
    encoding: tuple[str, ...] = (),
) -> bool:
    """Write the study into its folder and run it; say whether all runs succeeded."""
    out.mkdir(parents=True, exist_ok=True)
    folder, _, val, tests, licence = FILES[args.case]
    place = (DATA / folder).resolve()
    model = str(Path(teacher).resolve()) if Path(teacher).exists() else teacher
    content = {
        "name": args.case,
        "out": ".",
        "store": "data.kdcache",
        "data": {**data_files(args.case, out), "licence": licence},
        "teachers": {"teacher": {"model": model, "encoding": list(encoding)}},
        "pairs": [{"teacher": "teacher", "student": args.student}],
        "strategies": strategies,
        "seeds": args.seeds,
        "steps": args.steps,
        "set": {"training.batch_size": args.batch_size, **SETTINGS.get(args.case, {})},
        "val": str(place / f"{val}.extxyz"),
        "test": {test: str(place / f"{test}.extxyz") for test in tests},
    }
    study = out / "study.yaml"
    study.write_text(yaml.safe_dump(content, sort_keys=False))
    more = [word for text in args.set for word in ("--set", f"set.{text}")]
    return succeeds([*KD, "study", study, "--jobs", args.jobs, "--threads", 1, *more])


def data_files(case: str, out: Path) -> dict[str, Any]:
    """Return what the store is made from."""
    folder, training, *_ = FILES[case]
    source = (DATA / folder / f"{training}.extxyz").resolve()
    if case != "ethanol-100":
        return {"files": [str(source)]}
    labelled, pool = out / "labelled.extxyz", out / "pool.extxyz"
    if not pool.exists():
        frames = ase.io.read(source, ":")
        ase.io.write(labelled, frames[::9])  # 100 of 900, spread over the file
        ase.io.write(pool, [f for i, f in enumerate(frames) if i % 9])
    return {"files": [labelled.name], "drop_labels": [pool.name]}


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
