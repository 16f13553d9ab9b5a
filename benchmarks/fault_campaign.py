"""What becomes of a store when writers are killed, bits flip, or somebody means harm; counts of each.

    OMP_NUM_THREADS=1 python benchmarks/fault_campaign.py [--only kills|flips|hostile] [--count N] [--seed 0]
        [--out results.json] [--folder FOLDER]

kills: cache-teacher, copy, merge, add and repair die by SIGKILL at random points, N in all (210); every time
what is committed must be right, and the same command again must give the files of a calm run, byte for byte.
flips: one random bit of a finished store is flipped, N times (200), half of them in a file chosen at random,
half at a place chosen among all bytes; a full verify must find it, and reading everything must be refused or
give the same values. hostile: N stores (100) of those of tests/cache_schema/hostile_stores.py are opened,
verified, read, copied, merged, exported, repaired; each must be met with one clear error, within 10 seconds
and 200 MB, with nothing outside touched. Prints tables; exit status 1 if anything was lost, or
wrong in silence.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fault_kills import ENCODINGS, SIGNALS, commands, kill_often
from made_up_faults import make

from molkd.cache_schema.errors import MolkdError
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify

COUNTS = {"kills": 210, "flips": 200, "hostile": 100}
HELPERS = ("cache_example", "hostile_edits", "hostile_stores", "hostile_attempts")
MOST_SHOWN = 20
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(COUNTS), help="one kind; default: all")
    parser.add_argument("--count", type=int, help="of each kind; default: 210 kills, 200 flips, 100 stores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the counts in JSON")
    parser.add_argument("--folder", type=Path, help="where the stores are made; default: a temporary folder")
    args = parser.parse_args()
    campaigns: dict[str, Callable[[Path, int, np.random.Generator], list[Row]]] = {
        "kills": kills,
        "flips": flips,
        "hostile": hostile,
    }
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        in_child(lambda: make(Path(name), SIGNALS, ENCODINGS))
        for kind in [args.only] if args.only else COUNTS:
            began = time.perf_counter()
            rng = np.random.default_rng([args.seed, list(COUNTS).index(kind)])
            rows = campaigns[kind](Path(name), args.count or COUNTS[kind], rng)
            results[kind] = {"rows": rows, "seconds": time.perf_counter() - began, "seed": args.seed}
            print(f"\n{table(kind, rows)}\n\n{results[kind]['seconds']:.0f} s", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    wrong = [one for result in results.values() for row in result["rows"] for one in row["wrong"]]
    if wrong:
        more = [f"and {len(wrong) - MOST_SHOWN} more"] if len(wrong) > MOST_SHOWN else []
        sys.exit("\n".join([f"{len(wrong)} times something was lost or wrong:", *wrong[:MOST_SHOWN], *more]))


def in_child(act: Callable[[], object]) -> None:
    """Do it in a forked process, so that this one, from which all are forked, stays without threads."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        sys.exit("the stores of the campaign could not be made")


def table(kind: str, rows: list[Row]) -> str:
    """Return the counts as Markdown, the last row their sums."""
    keys = [key for key in rows[0] if key not in ("of", "wrong")]
    total = {"of": "all"} | {key: sum(row[key] for row in rows) for key in keys}
    total["wrong"] = [one for row in rows for one in row["wrong"]]
    lines = [f"| {kind} | {' | '.join(keys)} | lost or wrong |", f"| --- |{' ---: |' * (len(keys) + 1)}"]
    lines += [
        f"| {row['of']} | {' | '.join(str(row[key]) for key in keys)} | {len(row['wrong'])} |"
        for row in [*rows, total]
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ kinds


def kills(folder: Path, n_kills: int, rng: np.random.Generator) -> list[Row]:
    """Kill every command equally often."""
    rows, left = [], n_kills
    every = commands(folder)
    for k, command in enumerate(every):
        share = left // (len(every) - k)
        left -= share
        if not share:
            continue
        found = kill_often(command, folder, share, rng)
        rows.append(
            {
                "of": command.name,
                "killed": found.kills + found.second_kills,
                "commands survived": found.survived,
                "wrong": found.wrong,
            }
        )
        print(f"{command.name}: {share} kills, {len(found.wrong)} wrong", file=sys.stderr, flush=True)
    return rows


def flips(folder: Path, n_flips: int, rng: np.random.Generator) -> list[Row]:
    """Flip bits of one store, each alone."""
    store = folder / "flipped.kdcache"
    shutil.copytree(folder / "whole.kdcache", store)
    expected = read_everything(store)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    ends = np.cumsum([path.stat().st_size for path in files])
    counts: dict[str, Counter[str]] = {}
    wrong: dict[str, list[str]] = {}
    for k in range(n_flips):
        place = (
            int(rng.integers(len(files)))
            if k % 2
            else int(np.searchsorted(ends, rng.integers(ends[-1]), "right"))
        )
        path = files[place]
        kind, raw = kind_of(path.relative_to(store)), path.read_bytes()
        bit = int(rng.integers(8 * len(raw)))
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        outcome, complaint = met(store, expected)
        path.write_bytes(raw)
        counts.setdefault(kind, Counter()).update(["flipped", *outcome])
        where = f"bit {bit} of {path.relative_to(store)}"
        wrong.setdefault(kind, []).extend(f"{where}: {one}" for one in complaint)
    if not verify(store).ok or not same(read_everything(store), expected):
        wrong.setdefault("all", []).append("the store is not what it was")
    keys = ("flipped", "found by verify", "refused when read", "read the same")
    return [
        {"of": kind} | {key: found[key] for key in keys} | {"wrong": wrong.get(kind, [])}
        for kind, found in sorted(counts.items())
    ]


def hostile(folder: Path, n_stores: int, rng: np.random.Generator) -> list[Row]:
    """Try everything on stores that were made to harm; families take turns."""
    tests = Path(__file__).parents[1] / "tests" / "cache_schema"
    modules = {name: load(tests / f"{name}.py") for name in HELPERS}
    attempts = modules["hostile_attempts"]
    expected = attempts.make_victim(folder / "victim.kdcache")
    families: dict[str, list[tuple[str, Any]]] = {}
    for name, make_one in modules["hostile_stores"].cases():
        families.setdefault(name.split(" ")[0], []).append((name, make_one))
    turns = [list(rng.permutation(len(cases))) for cases in families.values()]
    chosen: dict[str, list[tuple[str, Any]]] = {}
    while sum(map(len, chosen.values())) < n_stores and any(turns):
        for (family, cases), turn in zip(families.items(), turns, strict=True):
            if turn and sum(map(len, chosen.values())) < n_stores:
                chosen.setdefault(family, []).append(cases[turn.pop()])
    rows = []
    for family, cases in chosen.items():
        counts: Counter[str] = Counter()
        wrong = []
        for name, make_one in cases:
            results = attempts.attempt(make_one, folder / "victim.kdcache", expected, folder / "case")
            wrong += attempts.complaints(name, results)
            refused = [came.startswith("refused") for came in results.values()]
            found = results["verify"].startswith("refused")
            counts.update({"attempts": len(results), "refused": sum(refused), "found by verify": int(found)})
            counts["done rightly"] += sum(came == "ok" for came in results.values())
        keys = ("found by verify", "attempts", "refused", "done rightly")
        rows.append(
            {"of": family, "stores": len(cases)} | {key: counts[key] for key in keys} | {"wrong": wrong}
        )
    return rows


# ---------------------------------------------------------------------------------------------------- details


def kind_of(path: Path) -> str:
    """Say what a file of a store is."""
    if path.parts[0] == "log":
        return "commit records"
    if path.parts[0] != "data.zarr":
        return path.name
    if path.name == "zarr.json":
        return "zarr.json"
    if path.parts[1] == "systems":
        return "systems table"
    codebook = {"step", "mean", "bits", "basis"} & set(path.parts)
    return "codebooks" if codebook else "atoms" if path.parts[1] == "atoms" else "signals"


def met(store: Path, expected: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """Verify and read a store with a flipped bit; return what to count, and what is wrong."""
    outcome, wrong = [], []
    try:
        is_found = not verify(store).ok
    except MolkdError:
        is_found = True
    except Exception as error:
        is_found = False
        wrong.append(f"verify failed with {error!r}")
    if is_found:
        outcome.append("found by verify")
    else:
        wrong.append("verify does not find it")
    try:
        if same(read_everything(store), expected):
            outcome.append("read the same")
        else:
            wrong.append("other values are read")
    except MolkdError:
        outcome.append("refused when read")
    except Exception as error:
        wrong.append(f"reading failed with {error!r}")
    return outcome, wrong


def read_everything(store: Path) -> dict[str, np.ndarray]:
    """Read all values, and what is known of systems and teachers."""
    with Cache.open(store) as cache:
        every = np.arange(cache.n_systems)
        values = cache.read(every) | {"ids": cache.ids, "source": cache.source, "row": cache.source_row}
        for teacher, entry in cache.teachers.items():
            values |= cache.read(every, (), teacher, tuple(entry.signals))
            values[teacher] = np.array(json.dumps(entry.provenance, sort_keys=True))
        values["dataset"] = np.array(json.dumps([cache.dataset, cache.source_names], sort_keys=True))
        return values


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Say whether arrays are the same, NaN included."""
    return one.keys() == other.keys() and all(
        np.array_equal(a, other[name], equal_nan=a.dtype.kind == "f") for name, a in one.items()
    )


def load(path: Path) -> Any:
    """Import a helper of the tests by its path, under the name by which its neighbours import it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
