"""Repair a store: find every broken or missing shard, and have exactly these put in place again."""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from molkd.cache_schema.commit import Commit
from molkd.cache_schema.damage import Damage, DamagedStore, Healer, Outcome
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.files import sweep
from molkd.cache_schema.findings import Report
from molkd.cache_schema.groups import (
    ATOMS,
    Group,
    list_signal_groups,
    list_teachers,
    load_atoms,
    load_commit,
    load_signal,
)
from molkd.cache_schema.layout import MANIFEST
from molkd.cache_schema.manifest import finalize_if_complete
from molkd.cache_schema.overlay import OVERLAY
from molkd.cache_schema.plan import Plan, Systems
from molkd.cache_schema.remote import writable_root
from molkd.cache_schema.repair_copy import IntactCopy
from molkd.cache_schema.repair_metadata import mend_plan, mend_signals, mend_table
from molkd.cache_schema.state import GroupState, Manifest, read_manifest
from molkd.cache_schema.verify import Progress, verify
from molkd.cache_schema.writer import Store

_WRONG = ("identity", "edges")  # kinds of problems of files that have the right checksums


def repair(
    path: str | Path,
    copy: str | Path | None = None,
    healers: Sequence[Healer] = (),
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Put back what is broken or missing in a store; what is intact is not touched.

    A damaged file is replaced at the moment its replacement is whole and on the disk, so the same call goes
    on after an interruption.

    Parameters
    ----------
    copy : an intact copy, a folder or a URL: a file is taken from it if its checksum is the one that intact
        records of both say
    healers : asked after the copy, in this order: what makes values again
    dry_run : only say what would be done
    progress : called with bytes checked and bytes in all

    Raises
    ------
    CacheError
        If the folder is no store, `copy` is none of it, or the disk is full.
    """
    root, outcome = writable_root(path), Outcome(dry_run)
    intact = IntactCopy(copy) if copy is not None else None
    plan = mend_plan(root, intact, outcome)
    if plan is None or (dry_run and outcome.done):
        return outcome  # without its plan nothing else of a store can be looked at
    if intact is not None:
        intact.require_same(root, plan)
    systems = mend_table(root, plan, intact, outcome)
    if systems is None:
        return outcome
    readable = mend_signals(root, plan, systems, intact, outcome)
    report = verify(root, progress=progress)
    store = _examine(root, plan, systems, readable, report)
    sources = [*([intact] if intact is not None else []), *healers]
    for is_atoms in (True, False):  # signals are computed from atoms
        _mend([d for d in store.damages if (d.group == ATOMS) is is_atoms], store, sources, outcome)
    _finish(store, report, outcome)
    return outcome


def _mend(damages: list[Damage], store: DamagedStore, sources: Sequence[Healer], outcome: Outcome) -> None:
    reasons: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for source in sources:
        failed = source.mend(store, damages, outcome) if damages else {}
        store.damages = [d for d in store.damages if d not in damages or d.key in failed]
        damages = [d for d in damages if d.key in failed]
        for key, reason in failed.items():
            reasons[key] += [reason] if reason else []
    for damage in damages:
        why = "; ".join([damage.reason, *reasons[damage.key]])
        outcome.needed.append(f"{damage.words}: {why}; {_wanted(damage.group)}")


def _wanted(group: str) -> str:
    other = "the data it was made of (--data)" if group == ATOMS else "its teacher (--teacher)"
    return f"give an intact copy of the store (--from), or {other}"


def _examine(
    root: Path, plan: Plan, systems: Systems, readable: Sequence[str], report: Report
) -> DamagedStore:
    """List the shards that are missing or broken."""
    groups = {} if (root / OVERLAY).exists() else {ATOMS: load_atoms(plan, systems)}
    groups |= {name: load_signal(root, plan, systems, name) for name in readable}
    for name in _declared(root):
        try:
            groups.setdefault(name, load_signal(root, plan, systems, name))
        except CacheError:
            continue  # nothing is stored in it, and `verify` says what is wrong with it
    manifest = _read_manifest(root, plan)
    found: defaultdict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
    for problem in report.problems:
        if problem.shard is not None:
            name = problem.array if problem.array in groups else problem.array.rpartition("/")[0]
            found[name, problem.shard].append((problem.kind, problem.message))
    damages = []
    for name, group in groups.items():
        listed = _listed(root, plan, manifest, group)
        for shard in range(plan.n_shards):
            damage = _damage(root, plan, group, shard, listed, found[name, shard])
            if damage is not None:
                damages.append(damage)
    return DamagedStore(root, plan, systems, groups, damages)


def _damage(
    root: Path,
    plan: Plan,
    group: Group,
    shard: int,
    listed: GroupState,
    found: list[tuple[str, str]],
) -> Damage | None:
    commit: Commit | None = None
    reason = "not written"
    try:
        commit = load_commit(root, plan, group, shard)
    except CacheError as error:
        reason = str(error)
    if commit is not None and not found:
        return None
    files = commit.files if commit is not None else listed.files.get(shard)
    return Damage(
        group=group.name,
        shard=shard,
        reason="; ".join(message for _, message in found) or reason,
        reference={name: file.crc32c for name, file in files.items()} if files is not None else None,
        has_record=commit is not None,
        bad_systems=frozenset(commit.bad_systems if commit is not None else listed.bad_systems),
        is_wrong=any(kind in _WRONG for kind, _ in found),
    )


def _finish(store: DamagedStore, report: Report, outcome: Outcome) -> None:
    """Bring the manifest up to date, and look once more at what was put in place."""
    is_stale = any(problem.kind == "manifest" for problem in report.problems)
    is_absent = not (store.root / MANIFEST).exists()
    if not outcome.is_dry and not outcome.needed:
        try:
            is_complete = finalize_if_complete(Store.open(store.root, "a"))
            if is_stale and not is_complete:
                (store.root / MANIFEST).unlink()
            is_stale |= is_absent and is_complete
        except IntegrityError:  # of metadata that nothing vouches for, which `verify` finds again
            is_stale = False
    if is_stale and not outcome.needed:
        outcome.did(MANIFEST, "the commit records")
    if outcome.is_dry:
        return
    for note in report.notes:
        if note.kind == "temporary":  # of a repair, or another writer, that was killed
            sweep((store.root / note.path).parent)
    known = " ".join(outcome.needed)
    named = [f"{store.root / line.partition(': ')[0]}: " for line in outcome.needed]  # of files
    for problem in verify(store.root, shards=outcome.shards).problems:
        key = (
            problem.array if problem.array in store.groups else problem.array.rpartition("/")[0],
            problem.shard,
        )
        is_named = bool(problem.array) and problem.array in known
        is_named |= any(file in problem.message for file in named)  # several signals may need it
        if key not in {damage.key for damage in store.damages} and not is_named:
            outcome.needed.append(str(problem))


def _declared(root: Path) -> list[str]:
    """Return the groups of signals that can be listed."""
    names: list[str] = []
    with contextlib.suppress(CacheError, OSError):
        for teacher in list_teachers(root):
            with contextlib.suppress(CacheError, OSError):
                names += list_signal_groups(root, teacher)
    return names


def _read_manifest(root: Path, plan: Plan) -> Manifest | None:
    try:
        return read_manifest(root, plan)
    except CacheError:
        return None


def _listed(root: Path, plan: Plan, manifest: Manifest | None, group: Group) -> GroupState:
    """Return what an intact manifest says about a group."""
    nothing = GroupState(group, root)
    if manifest is None or group.name not in manifest.groups:
        return nothing
    try:
        return manifest.state(root, plan, group)
    except CacheError:
        return nothing
