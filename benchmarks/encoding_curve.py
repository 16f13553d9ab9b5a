"""Bytes an atom against what a student learns: the same runs from one teacher's features in each encoding.

    python benchmarks/encoding_curve.py acac OUT --teacher RUN_OR_MODEL [--kd n2n] [--seeds 3] [--steps 2500]
        [--encodings fp32 fp16 int8 1/4 1/8 1/16 1/32] [--set model.max_neighbors=16 ...]

1/8 stands for pca whose codes take an eighth of float32; each row has a scale of 2 bytes more. Each encoding
gets a store of its own in OUT; the runs are those of `gap_closed.py`. The same command continues. Ends with a
table: bytes an atom of the features, their error on systems that were not fitted, the loss floor, and the
student's errors on the test files, mean and sample standard deviation over seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from gap_closed import DATA, FILES, KD, make, output

FEATURES = {"n2n": "node", "e2n": "e2n", "v2v": "v2v"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=FILES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--kd", nargs="+", default=["n2n"], choices=FEATURES)
    parser.add_argument(
        "--encodings", nargs="+", default=["fp32", "fp16", "int8", "1/4", "1/8", "1/16", "1/32"]
    )
    parser.add_argument("--student", default="painn-tiny")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"skipped: the data sets are not at {DATA}")
    specs = json.loads(output([*KD, "teacher", "info", args.teacher, "--json"]))["signals"]
    signals = [FEATURES[loss] for loss in args.kd]
    channels = {s: specs[s]["shape"][-1] for s in signals}
    results = {}
    for encoding in args.encodings:
        folder = args.out / encoding.replace("/", "-")
        codes = tuple(f"{s}={named(encoding, channels[s])}" for s in signals)
        make(args, folder, {"kd": args.kd}, args.teacher, codes)  # what failed is named and left out
        runs = [path.parent for path in sorted(folder.glob("runs/*/kd/seed*/metrics.json"))]
        if not runs:
            sys.exit(f"{folder}: no run has finished")
        described = json.loads(output([*KD, "cache", "info", folder / "data.kdcache", "--json"]))
        results[encoding] = (described["teachers"]["teacher"]["signals"], runs)
    report(results, signals)


def named(encoding: str, channels: int) -> str:
    """Return what `--encoding` takes for a share of float32 of a signal with so many channels."""
    if "/" not in encoding:
        return encoding
    return f"pca:{max(1, 4 * channels // int(encoding.split('/')[1]))}"


def report(results: dict[str, tuple[dict[str, dict], list[Path]]], signals: list[str]) -> None:
    """Print one line an encoding."""
    for encoding, (described, runs) in results.items():
        print(f"\n{encoding}")
        for s in signals:
            one = described[s]
            held_out = one.get("held_out_error_rms", one["error_rms"])
            print(
                f"  {s} {one['encoding']}: {one['bytes_per_atom']:.0f} bytes/atom, error {held_out:.3g} "
                f"(rms of the signal {one['rms']:.3g}), loss floor {one['loss_floor']:.3g}"
            )
        tests = [json.loads((run / "metrics.json").read_text())["test"] for run in runs]
        for name in tests[0]:
            for metric, unit in (("energy_mae_meV", "meV"), ("force_mae_meV_A", "meV/A")):
                values = [test[name][metric] for test in tests]
                spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                print(f"  {name} {metric}: {statistics.mean(values):.2f} ± {spread:.2f} {unit}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {error}")
