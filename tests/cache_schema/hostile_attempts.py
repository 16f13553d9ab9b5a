"""What people do with a store that they were given, tried on hostile ones in a child with little memory."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from cache_example import PROVENANCE, TEACHER, create, make_example, write_shard
from hostile_stores import CASES, HARMLESS

from molkd.cache_schema.codebook import Codebook
from molkd.cache_schema.errors import MolkdError
from molkd.cache_schema.fields import node_spec
from molkd.cache_schema.manifest import finalize, info
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.repair import repair
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store
from molkd.pipeline.sharing.card import describe_store, store_card
from molkd.pipeline.sharing.copying import copy_store
from molkd.pipeline.sharing.exporting import export_store
from molkd.pipeline.sharing.listing import list_stores
from molkd.pipeline.sharing.merging import merge_stores

MEMORY_BYTES = 200 << 20  # beyond what the imports take
SECONDS = 10
MESSAGE = 3000  # characters that an error may have at most
Values = dict[str, np.ndarray]


def make_victim(path: Path) -> Values:
    """Write the store that all hostile ones are made of; return what can be read from it."""
    example = make_example([5, 40, 17, 1, 80], seed=2)
    store = create(path, example)
    store.add_teacher(TEACHER, PROVENANCE)
    book = Codebook(
        "int8", np.full(4, 0.05, np.float32), np.full(4, 8, np.uint8), np.zeros(4, np.float32), None, 2
    )
    store.add_signal(TEACHER, node_spec(4), "int8", book)
    groups = ["atoms", f"teachers/{TEACHER}/node", *[g for g in _others(store) if not g.endswith("/node")]]
    for group in groups:
        for shard in store.missing_shards(group):
            write_shard(store, example, group, shard)
    finalize(store)
    return read_all(path)


def _others(store: Store) -> list[str]:
    from cache_example import SIGNALS

    return [store.add_signal(TEACHER, spec, how) for spec, how in SIGNALS if spec.name != "node"]


def read_all(path: Path) -> Values:
    """Read every value of a store."""
    with Cache.open(path) as cache:
        every = np.arange(cache.n_systems)
        values = cache.read(every)
        for teacher, entry in cache.teachers.items():
            values |= cache.read(every, (), teacher, tuple(entry.signals))
        return values


def _read(store: Path, work: Path, expected: Values) -> str:
    found = read_all(store)
    same = found.keys() == expected.keys() and all(
        np.array_equal(found[k], expected[k], equal_nan=found[k].dtype.kind == "f") for k in expected
    )
    return "ok" if same else "other values"


def _verify(store: Path, work: Path, expected: Values) -> str:
    for quick in (True, False):
        report = verify(store, quick=quick)
        if not report.ok:
            return f"refused: {report.problems[0]}"
    return "ok"


def _act(act: Callable[[Path, Path], object]) -> Callable[[Path, Path, Values], str]:
    def run(store: Path, work: Path, expected: Values) -> str:
        act(store, work)
        return "ok"

    return run


FIRST = {"read": _read, "verify": _verify}
MORE = {
    "open": _act(lambda store, work: Store.open(store, "a")),
    "info": _act(lambda store, work: json.dumps(info(store))),
    "card": _act(lambda store, work: store_card(describe_store(store)).encode()),
    "ls": _act(lambda store, work: list_stores(store.parent)),
    "copy": _act(lambda store, work: copy_store(store, work / "copy.kdcache")),
    "merge": _act(lambda store, work: merge_stores([store, store], work / "merged.kdcache")),
    "export": _act(lambda store, work: export_store(store, work / "x.npz")),
    "repair": _act(lambda store, work: repair(store)),
}


def attempt(name: str, victim: Path, expected: Values, folder: Path, *, with_more: bool) -> dict[str, str]:
    """Make the hostile store `name` and try everything on it; return what came of each.

    "ok", "refused: MESSAGE", "other values", or something that begins with WRONG.
    """
    store, outside, work = folder / "x.kdcache", folder / "outside", folder / "work"
    for path in (outside, work):
        path.mkdir(parents=True)
    (outside / "secret.txt").write_text("keep out")
    shutil.copytree(victim, store)
    CASES[name](store, outside)
    before = dict(_state(outside))
    results = _in_child(store, work, expected, FIRST | (MORE if with_more else {}))
    if dict(_state(outside)) != before:
        results["outside"] = "WRONG: something outside was changed"
    subprocess.run(["rm", "-rf", folder], check=True)  # however deeply nested
    return results


def verdict(name: str, results: dict[str, str]) -> str:
    """Return what is wrong with the way a hostile store was met; "" if nothing is."""
    wrong = [f"{name}: {what}: {came}" for what, came in results.items() if came.startswith("WRONG")]
    is_found = results.get("verify", "").startswith("refused")
    if results.get("read") == "other values" and not is_found:
        wrong.append(f"{name}: other values are read, and verify finds nothing")
    is_harmless = name.rsplit(" ", 1)[0] in HARMLESS or name.split(" ")[0] in HARMLESS
    if not is_harmless and not is_found:
        wrong.append(f"{name}: verify finds nothing")
    return "; ".join(wrong)


def _state(folder: Path) -> Iterator[tuple[str, object]]:
    for path in sorted(folder.rglob("*")):
        found = path.lstat()
        yield str(path), (found.st_size, found.st_mtime_ns, found.st_mode)


def _in_child(
    store: Path, work: Path, expected: Values, actions: dict[str, Callable[..., str]]
) -> dict[str, str]:
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        _limit_memory()
        for what, act in actions.items():
            os.write(send, (json.dumps({what: _outcome(act, store, work, expected)}) + "\n").encode())
        os._exit(0)
    os.close(send)
    results: dict[str, str] = {}
    began = time.monotonic()
    with os.fdopen(receive) as lines:
        for line in lines:
            results |= json.loads(line)
    status = os.waitpid(pid, 0)[1]
    if status:
        running = next(what for what in actions if what not in results)
        results[running] = f"WRONG: died of signal {status & 127} after {time.monotonic() - began:.1f} s"
    return results


def _limit_memory() -> None:
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = n_pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _outcome(act: Callable[..., str], store: Path, work: Path, expected: Values) -> str:
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        return act(store, work, expected)
    except MolkdError as error:
        text = str(error)
        return f"refused: {text}" if len(text) < MESSAGE else f"WRONG: {len(text)} characters of message"
    except BaseException as error:
        place = "".join(traceback.format_tb(error.__traceback__)[-3:])
        return f"WRONG: {type(error).__name__}: {error} {place}"[:2000]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
