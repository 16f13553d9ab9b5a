"""Where each run of a study stands, as its folder says: no list of a study's own could disagree with it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from molkd.pipeline.distill.run_folder import RunFolder
from molkd.pipeline.errors import IntegrityError
from molkd.pipeline.files import write_atomic
from molkd.pipeline.study.grid import Run

FAILED = "failed.json"
DIVERGED = "diverged"  # the kind of failure that the same settings would bring again


class State(Enum):
    """What became of a run so far."""

    FINISHED = "finished"
    RUNNING = "running"  # in another process
    FAILED = "failed"
    BEGUN = "begun"  # interrupted; continues at its last checkpoint
    NEW = "new"


@dataclass(frozen=True)
class Failure:
    """Why a run ended without result."""

    kind: str  # "diverged", "killed", "error" or "unexpected"
    reason: str  # one line
    trace: str = ""  # the end of what the process wrote to stderr


@dataclass(frozen=True)
class Standing:
    """A run and where it stands."""

    run: Run
    state: State
    failure: Failure | None = None
    summary: dict[str, Any] | None = None  # metrics.json of a finished run


def standing_of(run: Run) -> Standing:
    """Look into a run's folder."""
    folder = RunFolder(run.path)
    if (summary := folder.finished()) is not None:
        return Standing(run, State.FINISHED, summary=summary)
    if folder.is_busy:
        return Standing(run, State.RUNNING)
    if (failure := read_failure(run.path)) is not None:
        return Standing(run, State.FAILED, failure)
    return Standing(run, State.BEGUN if folder.has_begun else State.NEW)


def to_do(standings: Sequence[Standing], *, retry: bool) -> list[Run]:
    """Return the runs to make: all but those that finished, or diverged and would again."""
    return [
        s.run
        for s in standings
        if s.state is not State.FINISHED and (retry or s.failure is None or s.failure.kind != DIVERGED)
    ]


def read_failure(run: Path) -> Failure | None:
    """Return why a run failed when it was last tried; None if it did not.

    Raises
    ------
    IntegrityError
        If the record is damaged.
    """
    path = run / FAILED
    if not path.exists():
        return None
    try:
        return Failure(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{path}: damaged ({error}); remove it to have the run tried again") from None


def note_failure(run: Path, failure: Failure) -> None:
    """Write down why a run failed."""
    write_atomic(run / FAILED, json.dumps(asdict(failure), indent=1) + "\n")


def forget_failure(run: Path) -> None:
    """Remove the record, as the run is tried again."""
    (run / FAILED).unlink(missing_ok=True)
