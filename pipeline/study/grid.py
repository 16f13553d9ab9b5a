"""From a study's settings to its runs: pairs x strategies x settings x seeds, each with its folder."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from molkd.pipeline.config import TrainConfig, kd_settings, merged, nested
from molkd.pipeline.distill.objective import needed_signals
from molkd.pipeline.distill.recipe import SIGNALS as FOR_RECIPE
from molkd.pipeline.distill.run_folder import RunFolder
from molkd.pipeline.distill.settings import train_config
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation.runs import BOOKKEEPING
from molkd.pipeline.places import Place, short_name
from molkd.pipeline.study.names import nearest
from molkd.pipeline.study.schema import FILTER_KEYS, Filter, Pair, StudyConfig, with_weight

RUNS = "runs"
MANY_EPOCHS = 10**6  # where a number of steps ends the run
_FLAGS = ("kd_head", "kd_loss")  # of `kd train-student`: of the terms that do not choose their own
_NOT_ITS_OWN = set(BOOKKEEPING - {"seed"})  # of two runs that compute the same


@dataclass(frozen=True)
class Cell:
    """One line of the tables: a pair, a strategy and one alternative of each axis."""

    pair: Pair
    strategy: str
    choices: Mapping[str, str] = field(default_factory=dict)  # axis -> alternative

    @property
    def name(self) -> str:
        """The folder over the seeds, from that of the study's runs."""
        return f"{self.pair.name}/{'__'.join([self.strategy, *self.choices.values()])}"

    def facts(self) -> dict[str, str]:
        """Return what filters may ask for, but for the seed."""
        facts = {"pair": self.pair.name, "teacher": self.pair.teacher, "student": self.pair.student}
        return {**facts, "strategy": self.strategy, **self.choices}


@dataclass(frozen=True)
class Run:
    """One run to make; `cells` are the lines of the tables that it counts in."""

    name: str  # of its folder, from that of the study's runs
    config: TrainConfig
    cells: tuple[Cell, ...]

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.config.out


def cells_of(study: StudyConfig) -> list[Cell]:
    """Return all lines that filters leave, in the order of the file.

    Raises
    ------
    ConfigError
        If a filter names what there is not, or nothing is left.
    """
    cells = [
        Cell(pair, strategy, choices)
        for pair in study.pairs
        for strategy in study.strategies
        for choices in _choices(study)
    ]
    seeds = [str(seed) for seed in study.seeds]
    for kind, filters in (("only", study.only), ("skip", study.skip)):
        for one in filters:
            _check_filter(kind, one, cells, seeds)
    left = [cell for cell in cells if any(_wanted(study, cell, seed) for seed in study.seeds)]
    if not left:
        raise ConfigError(f"{study.name}: only and skip leave no run; relax them")
    return left


def seeds_of(study: StudyConfig, cell: Cell) -> list[int]:
    """Return the seeds of a line that filters leave."""
    return [seed for seed in study.seeds if _wanted(study, cell, seed)]


def runs_of(study: StudyConfig, cells: Sequence[Cell], *, periodic: bool) -> list[Run]:
    """Return the runs behind the lines, seed by seed; what computes the same is one run.

    Such a run lies in the first folder that holds it already, else in that of its first line.

    Parameters
    ----------
    periodic : whether the data are

    Raises
    ------
    ConfigError
        If a setting is unknown or makes no sense.
    """
    found: dict[str, list[tuple[Cell, TrainConfig]]] = {}
    for seed in study.seeds:
        for cell in cells:
            if _wanted(study, cell, seed):
                config = _config(study, cell, seed, periodic=periodic)
                key = json.dumps(config.model_dump(mode="json", exclude=_NOT_ITS_OWN), sort_keys=True)
                found.setdefault(key, []).append((cell, config))
    return [_one_run(study, members) for members in found.values()]


def mixed_stores(runs: Sequence[Run]) -> list[Place]:
    """Return the further stores that runs mix in, each once."""
    return list(dict.fromkeys(mix.store for run in runs for mix in run.config.mix))


def check_mixed_names(runs: Sequence[Run]) -> None:
    """Refuse further stores of one name in several places: the tables tell runs apart by the name.

    Raises
    ------
    ConfigError
        With the two places.
    """
    places: dict[str, Place] = {}
    for place in mixed_stores(runs):
        if (other := places.setdefault(short_name(place), place)) != place:
            raise ConfigError(
                f"mix: {other} and {place} have one name, by which the tables tell runs apart; rename one"
            )


def signals_read(config: TrainConfig) -> tuple[str, ...]:
    """Return the teacher's signals that a run reads, or, where it chooses its losses itself, may read."""
    if config.kd_auto:
        return FOR_RECIPE
    return needed_signals(config.kd, pseudo_labels=config.pseudo_labels)


def matching(runs: Sequence[Run], pattern: str | None) -> list[Run]:
    """Return the runs whose folder, or any part of its path, a shell pattern fits.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if pattern is None:
        return list(runs)
    chosen = [run for run in runs if any(fnmatchcase(part, pattern) for part in (run.name, *_parts(run)))]
    if not chosen:
        parts = [part for run in runs for part in _parts(run)]
        raise ConfigError(f"--only {pattern}: fits no run; {nearest(pattern, parts)}")
    return chosen


def _parts(run: Run) -> list[str]:
    """Return the parts of a run's path, and its strategies and alternatives alone."""
    return [*run.name.split("/"), *(part for part in run.name.split("/")[1].split("__"))]


def _choices(study: StudyConfig) -> Iterator[dict[str, str]]:
    """Yield one alternative of each axis: crossed, but side by side within a group of `zip`."""
    group_of = {axis: group for group in study.zip for axis in group}
    groups = list(dict.fromkeys(group_of.get(axis, (axis,)) for axis in study.settings))
    together = [list(zip(*(study.settings[axis] for axis in group), strict=True)) for group in groups]
    for combination in itertools.product(*together):
        named = {
            axis: alternative
            for group, alternatives in zip(groups, combination, strict=True)
            for axis, alternative in zip(group, alternatives, strict=True)
        }
        yield {axis: named[axis] for axis in study.settings}


def _wanted(study: StudyConfig, cell: Cell, seed: int) -> bool:
    facts = {**cell.facts(), "seed": str(seed)}
    if study.only and not any(_fits(facts, one) for one in study.only):
        return False
    return not any(_fits(facts, one) for one in study.skip)


def _fits(facts: Mapping[str, str], wanted: Filter) -> bool:
    return all(
        any(fnmatchcase(facts[key], pattern) for pattern in patterns) for key, patterns in wanted.items()
    )


def _check_filter(kind: str, one: Filter, cells: Sequence[Cell], seeds: Sequence[str]) -> None:
    for key, patterns in one.items():
        valid = [*FILTER_KEYS, *cells[0].choices]
        if key not in valid:
            raise ConfigError(f"{kind}: {key}: {nearest(key, valid)}")
        values = seeds if key == "seed" else list(dict.fromkeys(cell.facts()[key] for cell in cells))
        for pattern in patterns:
            if not any(fnmatchcase(value, pattern) for value in values):
                raise ConfigError(f"{kind}: {key}: {pattern} fits none; {nearest(pattern, values)}")


def _config(study: StudyConfig, cell: Cell, seed: int, *, periodic: bool) -> TrainConfig:
    strategy = study.strategies[cell.strategy]
    layers = [study.label_keys, study.set, cell.pair.set, strategy.set]
    layers += [study.settings[axis][choice] for axis, choice in cell.choices.items()]
    asked = merged(*(nested(layer) for layer in layers))
    flags = {key.removeprefix("kd_"): asked.pop(key) for key in _FLAGS if key in asked}
    length = {"max_steps": study.steps, "max_epochs": MANY_EPOCHS} if study.steps else {}
    try:
        texts = [with_weight(term, cell.pair.lambdas) for term in strategy.kd]
        own = {
            "store": study.store,
            "out": study.out / RUNS / cell.name / f"seed{seed}",
            "student": cell.pair.student,
            **kd_settings(texts, **flags),
            "seed": seed,
            "test": study.test,
            "test_groups": study.test_groups,
            "label": "__".join([cell.strategy, *cell.choices.values()]),
        }
        if study.val:
            own["val"] = study.val
        config = train_config(cell.pair.student, {"training": length}, asked, own, periodic=periodic)
    except ConfigError as error:
        raise ConfigError(f"{cell.name}: {error}") from None
    return config.model_copy(update={"teacher": cell.pair.teacher if signals_read(config) else None})


def _one_run(study: StudyConfig, members: Sequence[tuple[Cell, TrainConfig]]) -> Run:
    begun = (config for _, config in members if RunFolder(config.out).has_begun)
    config = next(begun, members[0][1])
    name = config.out.relative_to(study.out / RUNS).as_posix()
    return Run(name, config, tuple(cell for cell, _ in members))


def check_folders(runs: Sequence[Run]) -> None:
    """Refuse folders that hold runs with other settings.

    Raises
    ------
    ConfigError
        With the settings that differ.
    """
    differing = {run.path: keys for run in runs if (keys := _differing(run))}
    if differing:
        path, keys = next(iter(differing.items()))
        more = f", as do {len(differing) - 1} more of the study" if len(differing) > 1 else ""
        raise ConfigError(
            f"{path}: holds a run with other settings ({', '.join(keys)}){more}; give the study another out, "
            "or remove what is there to start over"
        )


def _differing(run: Run) -> list[str]:
    folder = RunFolder(run.path)
    return folder.differing(folder.with_recipe(run.config) if run.config.kd_auto else run.config)
