"""Runs of a study without processes of their own, and what may happen to them."""

import json
from pathlib import Path

from molkd.pipeline.config import TrainConfig
from molkd.pipeline.study import child, local, process
from molkd.pipeline.study.state import forget_failure, note_failure


def train_here(monkeypatch):
    """Replace the process of a run by a call; return the list of run folders that grows with each."""
    started = []

    def perform(job, stops):
        config = TrainConfig.model_validate(job["config"])
        started.append(Path(config.out))
        forget_failure(config.out)
        answer = json.dumps(child.answer_of(config))
        outcome = process._outcome(0, answer, "", 1.0, is_stopped=False)
        if outcome.failure is not None:
            note_failure(config.out, outcome.failure)
        return outcome

    monkeypatch.setattr(local, "perform", perform)
    return started


def names(study):
    """Return the folders of all runs, as made from the file alone."""
    from molkd.pipeline.study.grid import cells_of, runs_of

    return [run.name for run in runs_of(study, cells_of(study), periodic=False)]


SMALL_TEACHER = {"model.hidden_channels": 8, "model.num_layers": 1, "training.batch_size": 4}
