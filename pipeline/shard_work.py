"""One shard of stage one, as every process does it: alone, as one of a job array, or as a Dask worker."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from molkd.cache_schema.files import sweep
from molkd.cache_schema.groups import load_signal
from molkd.cache_schema.layout import LOG
from molkd.cache_schema.writer import Store
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.device_narrowing import narrow_on_device
from molkd.pipeline.prefetch import Background, prefetch
from molkd.pipeline.shard_output import Written, commit, write
from molkd.pipeline.teacher_pass import TeacherPass, make_work
from molkd.pipeline.transfer import HostCopy, pin, side_stream

log = logging.getLogger(__name__)

PREFETCH = 3  # batches read ahead, and batches that wait to be written


@dataclass(frozen=True)
class Stage:
    """A teacher before a store that has room for its signals."""

    config: CacheConfig
    store: Store
    teacher_pass: TeacherPass
    name: str  # of the teacher in the store
    groups: Mapping[str, str]  # signal -> its group in the store


@dataclass(frozen=True)
class Outcome:
    """What became of a pass over a store."""

    store: Store
    name: str  # of the teacher in the store
    groups: Mapping[str, str]  # signal -> its group in the store
    n_computed: int  # systems
    written: Written


def missing_shards(store: Store, groups: Mapping[str, str]) -> list[int]:
    """Return the shards that some of the groups (values of the mapping) lack, in order."""
    return sorted(set[int]().union(*(store.missing_shards(group) for group in groups.values())))


def missing_groups(store: Store, groups: Mapping[str, str], shard: int) -> dict[str, str]:
    """Ask the commit log which of the groups lack this shard."""
    return {signal: group for signal, group in groups.items() if shard in store.missing_shards(group)}


def announce(store: Store, groups: Mapping[str, str], shards: Sequence[int]) -> int:
    """Say what there is to do, and return how many systems that is."""
    n_systems = sum(len(store.systems_of_shard(shard)) for shard in shards)
    if shards:
        log.info("%s: %d systems in %d shards to do", store.path, n_systems, len(shards))
    else:
        log.info("%s: all of %s is there, nothing to do", store.path, ", ".join(groups))
    return n_systems


def compute_shard(
    stage: Stage,
    shard: int,
    groups: Mapping[str, str],
    writing: Background,
    written: Written,
    on_systems: Callable[[int], object],
) -> None:
    """Compute the given signals of one shard; writing and committing follow behind, in `writing`.

    Parameters
    ----------
    groups : signal -> group, those to compute
    written : bytes and systems that are given up are added to it
    on_systems : is told the number of systems of each batch; what it raises stops the shard

    Raises
    ------
    TeacherError, CacheError
        If the teacher gives non-finite numbers or the store cannot be written; or later, from `writing`.
    """
    config, store, teacher_pass = stage.config, stage.store, stage.teacher_pass
    teacher, cache = teacher_pass.teacher, teacher_pass.cache
    stream = side_stream(teacher.device)
    works = make_work(
        cache,
        np.asarray(store.systems_of_shard(shard), dtype=np.int64),
        teacher.neighbor_rule,
        teacher.dtype,
        *config.budget(teacher.device.type),
    )
    if stream is not None:
        works = (replace(work, batch=pin(work.batch)) for work in works)  # in the prefetch thread
    # On a CPU values are narrowed by the thread that writes them, beside the teacher.
    declared = {s: store.signal(group) for s, group in groups.items()} if stream is not None else {}
    with ExitStack() as stack:
        writers = {s: stack.enter_context(store.shard_writer(group, shard)) for s, group in groups.items()}
        stack.callback(writing.settle)  # if anything fails: nobody writes any more when the files are dropped
        for work in prefetch(works, PREFETCH):
            for part, signals in teacher_pass.run(work, tuple(groups)):
                if stream is not None:
                    signals = narrow_on_device(signals, declared, part)
                copy = HostCopy(signals, stream)
                job = partial(write, writers, teacher.signals, part, copy, cache, written)
                writing.submit(partial(job, skip_bad=config.skip_bad))
                on_systems(len(part.indices))
        stack.pop_all()
    # Files are forced to disk and committed while the teacher is at the next shard. After a failed write rows
    # are missing, and a writer that lacks rows commits nothing.
    writing.submit(partial(commit, writers, written))


def sweep_shards(store: Store, groups: Mapping[str, str], shards: Sequence[int]) -> None:
    """Remove what processes that were killed left beside the files of finished shards."""
    for group in groups.values():
        layouts = load_signal(store.path, store.plan, store.systems, group).layouts.values()
        folders = {(store.path / layout.file(shard)).parent for layout in layouts for shard in shards}
        for folder in (store.path / LOG / group, *folders):
            sweep(folder)
