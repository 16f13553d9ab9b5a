"""`kd study --dry-run`: the grid, what is done, and what the rest would take in time and on disk."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from molkd.pipeline.evaluation.tables import Column, format_table
from molkd.pipeline.quiet import quiet
from molkd.pipeline.study.estimate import Clock, disk_bytes, duration, probe
from molkd.pipeline.study.fitting import Students, split_fitting
from molkd.pipeline.study.grid import cells_of, check_folders, matching, runs_of
from molkd.pipeline.study.local import share_out
from molkd.pipeline.study.options import StudyOptions
from molkd.pipeline.study.preparing import check_teachers, missing_of, open_store
from molkd.pipeline.study.run import absent_mixed, check_settings
from molkd.pipeline.study.schema import StudyConfig
from molkd.pipeline.study.state import Standing, State, standing_of, to_do
from molkd.pipeline.study.summary import listed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GridLine:
    """The seeds of one folder of runs."""

    line: str
    runs: int
    states: dict[str, int]  # state -> runs
    seconds: float | None  # of training, one run; None: not known


@dataclass(frozen=True)
class DryRun:
    """What a study would do."""

    name: str
    stage_one: list[str]  # what is missing before the runs
    lines: list[GridLine]
    skipped: dict[str, str]  # line -> why student and teacher do not go together
    n_runs: int
    n_to_make: int
    jobs: int
    seconds: float | None  # of training, until all are made; validation and tests come on top
    bytes: int  # on disk, of the runs to make

    def text(self) -> str:
        """Return the grid and the sums."""
        rows = [
            {
                "line": line.line,
                "runs": line.runs,
                "state": ", ".join(f"{n} {state}" for state, n in line.states.items()),
                "run": None if line.seconds is None else duration(line.seconds),
            }
            for line in self.lines
        ]
        columns = [Column("line", "runs/"), Column("runs", "seeds"), Column("state", "state")]
        parts = [format_table(rows, [*columns, Column("run", "time of a run")])]
        parts += [listed("left out", self.skipped)] if self.skipped else []
        parts += ["first: " + "; ".join(self.stage_one)] if self.stage_one else []
        time = "time not known yet" if self.seconds is None else f"about {duration(self.seconds)}"
        parts.append(
            f"{self.name}: {self.n_to_make} of {self.n_runs} runs to make, {self.jobs} side by side: {time}, "
            f"{self.bytes / 1e6:,.0f} MB on disk"
        )
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def dry_run(study: StudyConfig, options: StudyOptions) -> DryRun:
    """Say what `run_study` would do; nothing is written.

    Raises
    ------
    ConfigError, CacheError, DataError, ModelError, TeacherError
        If the study asks for what there is not.
    """
    cells = cells_of(study)
    check_settings(study, cells)
    cache = open_store(study)
    runs = runs_of(study, cells, periodic=cache is not None and bool(cache.pbc.any()))
    if cache is not None:
        check_folders(runs)
        check_teachers(study, cache)
    missing, students = missing_of(study, cache, runs), Students()
    absent = absent_mixed(matching(runs, options.only))
    skipped: dict[str, str] = {}
    if cache is not None and not missing.signals and not absent:
        runs, skipped = split_fitting(runs, cache, students)
    runs = matching(runs, options.only)
    standings = [standing_of(run) for run in runs]
    clock, left = Clock(standings), to_do(standings, retry=options.retry)
    if cache is not None and not missing.signals and not absent:
        with quiet("molkd.pipeline.distill", logging.ERROR):  # what runs say of their decisions
            probe(clock, cache, left)
    jobs, _, _ = share_out(runs[0].config.device, options.jobs, options.threads)
    jobs = min(jobs, max(1, len(left)))
    return DryRun(
        name=study.name,
        stage_one=[
            *missing.describe(),
            *(f"{store} is made, with kd augment or kd ingest" for store in absent),
        ],
        lines=_lines(standings, clock),
        skipped=skipped,
        n_runs=len(runs),
        n_to_make=len(left),
        jobs=jobs,
        seconds=clock.left(left, jobs) if left else 0.0,
        bytes=disk_bytes(left, students.n_parameters),
    )


def _lines(standings: Sequence[Standing], clock: Clock) -> list[GridLine]:
    by_line: dict[str, list[Standing]] = {}
    for standing in standings:
        by_line.setdefault(standing.run.name.rpartition("/")[0], []).append(standing)
    lines = []
    for name, members in by_line.items():
        counts = {state.value: sum(s.state is state for s in members) for state in State}
        states = {state: n for state, n in counts.items() if n}
        lines.append(GridLine(name, len(members), states, clock.seconds(members[0].run)))
    return lines
