"""Progress where there is no terminal: lines in the log, with hand-worked numbers."""

import io
import logging

import pytest

from molkd.pipeline import progress
from molkd.pipeline.progress import Progress


@pytest.fixture
def no_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    return stream


@pytest.fixture
def clock(monkeypatch, no_terminal):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_one_line_a_minute_with_rate_and_rest(clock, no_terminal, caplog):
    caplog.set_level(logging.INFO, "molkd")
    with Progress(400, "teacher", "system", initial=100) as bar:
        for _ in range(12):
            clock[0] += 10.0
            bar.update(5)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "teacher: 130 of 400 systems (32 %), 0.5 a second, about 540 s left",
        "teacher: 160 of 400 systems (40 %), 0.5 a second, about 480 s left",
    ]
    assert no_terminal.getvalue() == ""


def test_quick_work_says_nothing(clock, caplog):
    caplog.set_level(logging.INFO, "molkd")
    with Progress(0, "verify", "byte") as bar:
        bar.advance_to(10, 20)
        clock[0] += 59.0
        bar.advance_to(20, 20)
    assert (bar.done, bar.total) == (20, 20)
    assert caplog.records == []
