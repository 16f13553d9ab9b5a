"""`kd cache repair`: broken or missing shards again: from a copy, by the teacher, from the data."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from molkd.cache_schema.damage import Damage, DamagedStore, Healer, Outcome
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.groups import ATOMS, load_atoms, load_commit, teacher_provenance
from molkd.cache_schema.layout import split_signal_group
from molkd.cache_schema.mending import MendingStore
from molkd.cache_schema.overlay import base_of
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.repair import repair
from molkd.cache_schema.state import GroupState, load_states
from molkd.cache_schema.teachers import require_same
from molkd.pipeline.caching import provenance
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.device import choose_device
from molkd.pipeline.prefetch import Background
from molkd.pipeline.progress import Progress
from molkd.pipeline.repair_data import DataHealer
from molkd.pipeline.shard_output import Written
from molkd.pipeline.shard_work import PREFETCH, Stage, compute_shard
from molkd.pipeline.teacher_pass import TeacherPass
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher


@dataclass(frozen=True)
class RepairSummary:
    """What was put back into a store, and what is still wrong with it."""

    store: str
    is_dry_run: bool
    mended: list[str]  # what, and from where; in a dry run what would be
    needed: list[str]  # what is still broken, why, and what would mend it
    bytes_written: int
    seconds: float
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ok", not self.needed)

    def text(self) -> str:
        """Return a line for each file or shard, and a verdict."""
        verb = "would mend" if self.is_dry_run else "mended"
        lines = [f"{verb} {line}" for line in self.mended] + [f"still broken: {line}" for line in self.needed]
        if self.needed:
            verdict = f"{_things(self.needed)} {'is' if len(self.needed) == 1 else 'are'} still broken"
        elif self.mended:
            verdict = f"ok: {verb} {_things(self.mended)}, {self.bytes_written:,} bytes"
        else:
            verdict = "ok: nothing is broken or missing"
        return "\n".join([*lines, f"{self.store}: {verdict}"])


def _things(lines: Sequence[str]) -> str:
    return f"{len(lines)} thing{'' if len(lines) == 1 else 's'}"


def repair_store(
    store: Path,
    *,
    copy: str | Path | None = None,
    teacher: str | None = None,
    data: Sequence[str | Path] = (),
    energy_key: str | None = None,
    forces_key: str | None = None,
    scale_file: Path | None = None,
    device: str = "auto",
    batch_atoms: int = 0,
    batch_edges: int = 0,
    skip_bad: bool = False,
    accept_other_values: bool = False,
    dry_run: bool = False,
) -> RepairSummary:
    """Put back what is broken or missing in a store, and touch nothing else; the same call continues.

    Parameters
    ----------
    copy : an intact copy of the store, asked first
    teacher : computes signals again; its weights must be those of the store
    data : what the store was made of, for structures and labels
    energy_key, forces_key : names of the labels in `data`
    scale_file, device, batch_atoms, batch_edges, skip_bad : of the teacher, as for `cache_teacher`
    accept_other_values : whether a shard is written anew with what the teacher gives now if that is not what
        it held, as far as an intact record says; otherwise it is left as it is
    dry_run : look and say what would be done

    Raises
    ------
    CacheError
        If the folder is no store, `copy` is of another one, or the disk is full.
    DataError, TeacherError, ModelError
        If data or teacher cannot be used.
    """
    began = time.perf_counter()
    healers: list[Healer] = []
    if data:
        healers.append(DataHealer(data, energy_key, forces_key))
    if teacher is not None:
        config = CacheConfig(
            store=store,
            teacher=teacher,
            scale_file=scale_file,
            device=device,
            batch_atoms=batch_atoms,
            batch_edges=batch_edges,
            skip_bad=skip_bad,
        )
        healers.append(TeacherHealer(config, accept_other_values))
    with Progress(0, "verify", "byte") as progress:
        outcome = repair(store, copy, healers, dry_run=dry_run, progress=progress.advance_to)
    return RepairSummary(
        str(store), dry_run, outcome.done, outcome.needed, outcome.n_bytes, time.perf_counter() - began
    )


@dataclass(frozen=True)
class TeacherHealer:
    """Computes signals of broken shards again, in the encodings of the store.

    Attributes
    ----------
    config : the teacher, and how it runs
    accept_other_values : whether values other than those stored before take their place
    """

    config: CacheConfig
    accept_other_values: bool = False

    def mend(
        self, store: DamagedStore, damages: Sequence[Damage], outcome: Outcome
    ) -> dict[tuple[str, int], str]:
        """Compute and write shards; return why not, for those this teacher cannot.

        Raises
        ------
        TeacherError, ModelError
            If the teacher cannot be loaded, or gives non-finite numbers.
        CacheError
            If the store cannot be written.
        """
        reasons = {d.key: "" for d in damages if d.group == ATOMS}
        by_teacher: defaultdict[str, list[Damage]] = defaultdict(list)
        no_atoms = {d.shard for d in store.damages if d.group == ATOMS}
        for damage in damages:
            if damage.group == ATOMS:
                continue
            if damage.shard in no_atoms:
                reasons[damage.key] = "its structures are broken, too"
                continue
            by_teacher[split_signal_group(damage.group)[0]].append(damage)
        for name, mine in by_teacher.items():
            try:
                teacher = self._load(store, name)
            except CacheError as error:
                reasons |= {d.key: str(error) for d in mine}
                continue
            reasons |= self._compute(store, name, teacher, mine, outcome)
        return reasons

    def _load(self, store: DamagedStore, name: str) -> Teacher:
        """Return the teacher in the precision of the store; refuse another one.

        Raises
        ------
        CacheError
            Saying what differs.
        """
        known = teacher_provenance(store.root, name) or {}
        precision = known.get("precision", "float32")
        if precision not in ("float32", "float64"):
            raise CacheError(
                f"it computed in {precision}, this version knows float32 and float64; update molkd"
            )
        teacher = load_teacher(
            self.config.teacher,
            device=choose_device(self.config.device),
            dtype=getattr(torch, precision),
            scale_file=self.config.scale_file,
        )
        require_same(store.root, name, provenance(teacher))
        return teacher

    def _compute(
        self,
        store: DamagedStore,
        name: str,
        teacher: Teacher,
        damages: Sequence[Damage],
        outcome: Outcome,
    ) -> dict[tuple[str, int], str]:
        reasons: dict[tuple[str, int], str] = {}
        todo: defaultdict[int, dict[str, str]] = defaultdict(dict)  # shard -> signal -> group
        for damage in damages:
            signal = split_signal_group(damage.group)[1]
            if teacher.signals.get(signal) != store.groups[damage.group].signal.spec:
                reasons[damage.key] = f"{self.config.teacher} does not give {signal} as the store has it"
            else:
                todo[damage.shard][signal] = damage.group
        mine = [d for d in damages if d.key not in reasons]
        written = Written()
        if mine and not outcome.is_dry:
            skip_bad = self.config.skip_bad or any(d.bad_systems for d in mine)
            config = self.config.model_copy(update={"skip_bad": skip_bad})
            groups = {signal: group for wanted in todo.values() for signal, group in wanted.items()}
            exact = () if self.accept_other_values else groups.values()
            mending = MendingStore.of(store.root, store.references(), exact)
            stage = Stage(config, mending, TeacherPass(teacher, _structures(store, todo)), name, groups)
            n_systems = sum(len(store.systems.in_shard(shard)) for shard in todo)
            with (
                Progress(n_systems, "teacher", "system") as done,
                Background("kd-write", PREFETCH) as writing,
            ):
                for shard, wanted in sorted(todo.items()):
                    compute_shard(stage, shard, wanted, writing, written, done.update)
            reasons |= dict.fromkeys(
                mending.refused,
                f"{self.config.teacher} gives other values here than were stored, as on another device or "
                "with another --batch-atoms; --accept-other-values takes them",
            )
        for damage in mine:
            if damage.key not in reasons:
                outcome.did_shard(damage, self.config.teacher)
        outcome.n_bytes += written.n_bytes
        return reasons


def _structures(store: DamagedStore, shards: Sequence[int] | dict[int, dict[str, str]]) -> Cache:
    """Open the structures of some shards, all of which are whole; others need not be."""
    root, plan, systems = store.root, store.plan, store.systems
    base = base_of(root, plan)
    if base is not None:
        state = load_states(base, plan, systems, [ATOMS])[ATOMS]
    else:
        state = GroupState(load_atoms(plan, systems), root)
        for shard in shards:
            commit = load_commit(root, plan, state.group, shard)
            assert commit is not None, shard
            state.add(commit)
    return Cache(root, plan, systems, {ATOMS: state})
