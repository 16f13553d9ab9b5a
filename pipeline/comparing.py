"""`kd cka`: compare features within a model, between models, or with a teacher's signals in a store."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.sources import Source, open_source
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.data.system import System
from molkd.pipeline.data.validate import check_system
from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import ConfigError, DataError
from molkd.pipeline.evaluation.cka import CKASums, atom_batches
from molkd.pipeline.evaluation.cka_plot import plot_cka
from molkd.pipeline.evaluation.cka_result import FOLDER, CKAResult
from molkd.pipeline.evaluation.style import save_figure
from molkd.pipeline.feature_sources import FeatureSource, ModelFeatures, StoredFeatures, choose_taps
from molkd.pipeline.files import write_atomic
from molkd.pipeline.places import short_name
from molkd.pipeline.progress import Progress
from molkd.pipeline.similarity import MIN_ROWS

log = logging.getLogger(__name__)

Sides = list[tuple[FeatureSource, tuple[str, ...]]]  # one, or two that are compared, with their taps


def compare(
    a: str | None = None,
    b: str | None = None,
    *,
    out: Path,
    data: Path | str | None = None,
    store: Path | str | None = None,
    teacher: str | None = None,
    taps: Sequence[str] = (),
    taps_b: Sequence[str] = (),
    n_systems: int = 256,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "auto",
    scale_file: Path | None = None,
) -> CKAResult:
    """Compute the CKA of all pairs of features and write cka.json, cka.csv and cka.png into `out`.

    Parameters
    ----------
    a, b : run folders, model files or teachers; one alone is compared with itself
    store, teacher : a store, and which of its teachers, whose signals take the place of `b`, or of `a` if
        that is left out too
    data : structures; by default those of the store
    taps, taps_b : features to compare, those of the second side if they differ; by default all scalar
        layers and `node`
    n_systems : at most so many, drawn at random from those that both sides know
    scale_file : scale factors of the last model, if that is a checkpoint of OCP that holds none

    Raises
    ------
    ConfigError
        If there is nothing to compare, or no such feature; the nearest one is named.
    DataError
        If the data cannot be read, share no system with the store, or hold too few atoms.
    ModelError, TeacherError, CacheError
        If a model cannot be loaded, was not made for a system, or the store has no such teacher.
    """
    place = data if data is not None else store
    if place is None:
        raise ConfigError("no structures to compute features for; name some with --data")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; --out takes a folder")
    with ExitStack() as stack:
        cache = stack.enter_context(Cache.open(store)) if store is not None else None
        sides = _sides(a, b, cache, teacher, (taps, taps_b), (device, scale_file))
        source = stack.enter_context(closing(open_source(place)))
        result = _compare(sides, source, place, n_systems, seed, batch_size)
    result.save(out / "cka.json")
    write_atomic(out / "cka.csv", result.csv())
    save_figure(plot_cka(result), out / "cka.png")
    if a is not None and (Path(a) / "config.yaml").is_file():
        _keep(result, Path(a))
    return result


def _sides(
    a: str | None,
    b: str | None,
    cache: Cache | None,
    teacher: str | None,
    taps: tuple[Sequence[str], Sequence[str]],
    loading: tuple[str, Path | None],
) -> Sides:
    """Open what is compared and choose the features of each."""
    models = [model for model in (a, b) if model is not None]
    if len(models) + (cache is not None) not in (1, 2):
        raise ConfigError(
            "give one model, two, or one and --store"
            if not models
            else f"{b} and --store are both given as what to compare with; leave one out"
        )
    if teacher is not None and cache is None:
        raise ConfigError(f"--teacher {teacher} says which teacher of a store; name it with --store")
    device, scale_file = loading
    chosen = choose_device(device)
    sources: list[FeatureSource] = [
        ModelFeatures(m, chosen, scale_file if m is models[-1] else None) for m in models
    ]
    if cache is not None:
        sources.append(StoredFeatures(cache, teacher))
    if taps[1] and len(sources) == 1:
        sources *= 2  # some features of a model against others of it
    asked = (taps[0], taps[1] or taps[0])
    return [(source, choose_taps(source, names)) for source, names in zip(sources, asked, strict=False)]


def _compare(
    sides: Sides, source: Source, place: Path | str, n_systems: int, seed: int, batch_size: int
) -> CKAResult:
    rng = np.random.default_rng(seed)
    n_done = 0

    def blocks() -> Iterator[list[Tensor]]:
        nonlocal n_done
        systems = islice(_systems(source, sides, n_systems, rng), n_systems)
        while block := list(islice(systems, batch_size)):
            n_done += len(block)
            yield [features for side, taps in sides for features in side.read(block, taps)]

    sums, (first, last) = CKASums(), (sides[0], sides[-1])
    n_rows = len(first[1])
    for batch in atom_batches(blocks(), rng):
        sums.add(batch[:n_rows], batch[-len(last[1]) :])
    if not n_done:
        raise DataError(
            f"{place}: none of its systems has {', '.join(last[1])} of {last[0].name} in the store; "
            "systems are matched by what they are: give the structures that the store was made of"
        )
    if not sums.n_batches:
        raise DataError(f"{place}: CKA needs {MIN_ROWS} atoms or more, the {n_done} systems hold fewer")
    is_clear = first[0].name != last[0].name or first[0] is last[0]
    return CKAResult(
        a=first[0].name if is_clear else first[0].origin,
        b=last[0].name if is_clear else last[0].origin,
        data=short_name(place),
        rows=first[1],
        columns=last[1],
        values=sums.values(),
        n_systems=n_done,
        n_atoms=sums.n_atoms,
        n_batches=sums.n_batches,
        seed=seed,
        a_weights_sha256=first[0].weights_sha256,
        b_weights_sha256=last[0].weights_sha256,
    )


def _systems(source: Source, sides: Sides, n_systems: int, rng: np.random.Generator) -> Iterator[System]:
    """Yield the systems that all sides have features of, in random order, each checked."""
    known = [ids for side, taps in sides if (ids := side.ids(taps)) is not None]
    in_store = source.cache.ids if isinstance(source, StoreSource) else None
    with Progress(len(source) if known else min(n_systems, len(source)), "cka", "system") as progress:
        for index in rng.permutation(len(source)).tolist():
            progress.update()
            if in_store is not None and any(in_store[index].tobytes() not in ids for ids in known):
                continue
            system = source.read(index)
            check_system(system)
            if any(system.id not in ids for ids in known):
                continue
            for side, _ in sides:
                side.check(system)
            yield system


def _keep(result: CKAResult, run: Path) -> None:
    """Leave the result in the run's folder too, where reports look for it."""
    other = "itself" if result.within else result.b
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{other}-on-{result.data}")
    try:
        result.save(run / FOLDER / f"{name}.json")
    except DataError as error:
        log.warning("%s", error)
