"""Ctrl-C and SIGTERM as a flag, so that work can stop where it can go on later."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Turn SIGINT and SIGTERM into a flag.

    Yields
    ------
    A function that says how many of them have come. In a thread none does: whoever runs it handles them.
    """
    caught: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda n, _: caught.append(n))
    except ValueError:
        pass  # not the main thread
    try:
        yield lambda: len(caught)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
