"""How the runs of a study share a machine."""

import os

import pytest

from molkd.pipeline.study.local import share_out


@pytest.mark.parametrize(
    ("jobs", "threads", "shared"),
    [
        (None, None, (8, 1)),
        (3, None, (3, 1)),
        (1, None, (1, 1)),
        (None, 4, (2, 4)),
        (3, 4, (3, 4)),
        (None, 16, (1, 16)),
    ],
)
def test_a_run_on_a_cpu_has_one_thread_unless_more_are_asked_for(monkeypatch, jobs, threads, shared):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert share_out("cpu", jobs, threads) == (*shared, [])
