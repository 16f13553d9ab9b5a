"""What people do with a store that they were given, tried on hostile ones in a child with little memory.

    expected = make_victim(folder / "victim.kdcache")
    for name, make in cases():  # of hostile_stores
        results = attempt(make, folder / "victim.kdcache", expected, folder / "case")
        wrong += complaints(name, results)

`attempt` changes a copy of the store and forks one child for everything that is tried, which lives in 200 MB
beyond what the parent has and gets 10 seconds for each attempt. `results` says for each what came of it: "ok"
(what was asked for was done, and is right), "refused: MESSAGE", or what begins with "WRONG".
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cache_example import PROVENANCE, SIGNALS, TEACHER, create, make_example, write_shard
from hostile_stores import HARMLESS, Case

from molkd.cache_schema.codebook import Codebook
from molkd.cache_schema.errors import MolkdError
from molkd.cache_schema.manifest import finalize, info
from molkd.cache_schema.overlay import create_overlay
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.repair import repair
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store
from molkd.pipeline.sharing.card import describe_store, store_card
from molkd.pipeline.sharing.copying import copy_store
from molkd.pipeline.sharing.exporting import export_store
from molkd.pipeline.sharing.listing import list_stores
from molkd.pipeline.sharing.merging import merge_stores
from molkd.pipeline.sharing.selection import Selection, select_systems

MEMORY_BYTES = 200 << 20  # beyond what the imports take
SECONDS = 10
MESSAGE = 1000  # characters that an error may have at most
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scene:
    """Where things lie."""

    store: Path  # the hostile one
    good: Path  # the one that it was made of
    work: Path  # for what is made
    expected: Values  # of the good one


def make_victim(path: Path) -> Values:
    """Write the store that all hostile ones are made of; return what can be read from it."""
    example = make_example([5, 40, 17, 1, 80], seed=2)
    store = create(path, example)
    store.add_teacher(TEACHER, PROVENANCE)
    books = {"node": _codebook("int8", 4), "layer/U4": _codebook("pca:2", 2)}
    groups = ["atoms"]
    for spec, encoding in SIGNALS:
        if spec.name == "v2v":
            continue  # the fewer files, the sooner a store is copied
        book = books.get(spec.name)
        groups.append(store.add_signal(TEACHER, spec, book.encoding if book else encoding, book))
    for group in groups:
        for shard in store.missing_shards(group):
            write_shard(store, example, group, shard)
    finalize(store)
    return read_all(path)


def _codebook(encoding: str, n_channels: int) -> Codebook:
    basis = None if encoding == "int8" else np.eye(n_channels, dtype=np.float32)
    step, bits = np.full(n_channels, 0.05, np.float32), np.full(n_channels, 8, np.uint8)
    return Codebook(encoding, step, bits, np.zeros(n_channels, np.float32), basis, n_systems=2)


def read_all(path: Path) -> Values:
    """Read every value of a store."""
    with Cache.open(path) as cache:
        every = np.arange(cache.n_systems)
        values = cache.read(every)
        for teacher, entry in cache.teachers.items():
            values |= cache.read(every, (), teacher, tuple(entry.signals))
        return values


def attempt(
    make: Case, victim: Path, expected: Values, folder: Path, whats: Collection[str] = ()
) -> dict[str, str]:
    """Make a hostile store in a new folder, try things on it and remove it; return what came of each.

    Parameters
    ----------
    whats : which of `ATTEMPTS`; empty: all
    """
    store, outside, work = folder / "x.kdcache", folder / "outside", folder / "work"
    for path in (outside, work):
        path.mkdir(parents=True)
    (outside / "secret.txt").write_text("keep out")
    shutil.copytree(victim, store)
    make(store, outside)
    before = _state(folder, victim)
    todo = [what for what in ATTEMPTS if what in (whats or ATTEMPTS)]
    results = _in_child(Scene(store, victim, work, expected), todo)
    if _state(folder, victim) != before:
        results["outside"] = "WRONG: something outside was changed"
    subprocess.run(["rm", "-rf", folder], check=True)  # however deeply nested
    return results


def complaints(name: str, results: dict[str, str]) -> list[str]:
    """Return what is wrong with the way a hostile store was met."""
    wrong = [f"{name}: {what}: {came}" for what, came in results.items() if came.startswith("WRONG")]
    is_harmless = any(name.startswith(f"{one} ") for one in HARMLESS)
    if not is_harmless and not results["verify"].startswith("refused"):
        wrong.append(f"{name}: verify finds nothing")
    return wrong


# ---------------------------------------------------------------------------------------------- what is tried


def _same(path: Path, scene: Scene) -> str:
    """Say whether a store holds what it should."""
    found = read_all(path)
    same = found.keys() == scene.expected.keys() and all(
        np.array_equal(value, found[name], equal_nan=value.dtype.kind == "f")
        for name, value in scene.expected.items()
    )
    return "ok" if same else "WRONG: other values"


def _verify(scene: Scene, *, quick: bool = False) -> str:
    problems = verify(scene.store, quick=quick).problems
    return f"refused: {problems[0]}" if problems else "ok"


def _copy(scene: Scene) -> str:
    copy_store(scene.store, scene.work / "copy.kdcache")
    return _same(scene.work / "copy.kdcache", scene)


def _merge(scene: Scene) -> str:
    merge_stores([scene.good, scene.store], scene.work / "merged.kdcache")
    return _same(scene.work / "merged.kdcache", scene)


def _overlay(scene: Scene) -> str:
    create_overlay(scene.store, scene.work / "overlay.kdcache")
    return _same(scene.work / "overlay.kdcache", scene)


def _repair(scene: Scene) -> str:
    """Repair from the store that it was made of; what is then called whole must be."""
    needed = repair(scene.store, scene.good).needed
    if needed:
        return f"refused: {needed[0]}"
    if verify(scene.store).problems:
        return "WRONG: repaired, and verify finds problems"
    return _same(scene.store, scene)


def _done(act: Callable[[Scene], object]) -> Callable[[Scene], str]:
    def run(scene: Scene) -> str:
        act(scene)
        return "ok"

    return run


ATTEMPTS: dict[str, Callable[[Scene], str]] = {
    "read": lambda scene: _same(scene.store, scene),
    "verify quick": lambda scene: _verify(scene, quick=True),
    "verify": _verify,
    "info": _done(lambda scene: json.dumps(info(scene.store))),
    "card": _done(lambda scene: store_card(describe_store(scene.store)).encode()),
    "ls": _done(lambda scene: list_stores(scene.store.parent).text().encode()),
    "select": _done(
        lambda scene: select_systems(scene.store, scene.work / "ids.txt", Selection(contains=("C",)))
    ),
    "export": _done(lambda scene: export_store(scene.store, scene.work / "x.npz")),
    "overlay": _overlay,
    "copy": _copy,
    "merge": _merge,
    "repair dry": _done(lambda scene: repair(scene.store, dry_run=True)),
    # The store is changed from here on.
    "open": _done(lambda scene: Store.open(scene.store, "a")),
    "repair": _repair,
}


# -------------------------------------------------------------------------------------------------- the child


def _state(folder: Path, victim: Path) -> dict[str, tuple[object, ...]]:
    """Return what lies beside the hostile store, but for what was asked for."""
    outside = [path for path in folder.iterdir() if path.name != "work"]
    found = {}
    for path in [*outside, *(folder / "outside").rglob("*"), *victim.rglob("*")]:
        now = path.lstat()
        is_store = path.name == "x.kdcache"
        found[str(path)] = (now.st_mode, 0 if is_store else now.st_size, 0 if is_store else now.st_mtime_ns)
    return found


def _in_child(scene: Scene, todo: list[str]) -> dict[str, str]:
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        _limit_memory()
        for what in todo:
            os.write(send, (json.dumps({what: _outcome(ATTEMPTS[what], scene)}) + "\n").encode())
        os._exit(0)
    os.close(send)
    results: dict[str, str] = {}
    began = time.monotonic()
    with os.fdopen(receive) as lines:
        for line in lines:
            results |= json.loads(line)
    status = os.waitpid(pid, 0)[1]
    if status:
        running = next(what for what in todo if what not in results)
        results[running] = f"WRONG: died of signal {status & 127} after {time.monotonic() - began:.1f} s"
    return results


def _limit_memory() -> None:
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = n_pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _outcome(act: Callable[[Scene], str], scene: Scene) -> str:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it dies, whatever it waits for
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return act(scene)
    except MolkdError as error:
        return _judge(str(error), scene)
    except BaseException as error:
        place = "".join(traceback.format_tb(error.__traceback__)[-3:])
        return f"WRONG: {type(error).__name__}: {error} {place}"[:2000]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _judge(message: str, scene: Scene) -> str:
    """A message is one line, not long, and says which store it is about."""
    if len(message) > MESSAGE or "\n" in message or scene.store.name not in message:
        return f"WRONG: as an error of {len(message)} characters: {message[:MESSAGE]}"
    return f"refused: {message}"
