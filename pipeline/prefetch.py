"""Threads that stay a few items ahead of their consumer, and one that works off what is left behind."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_END = object()
_POLL_SECONDS = 0.05


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Run an iterator in a thread, at most `depth` items ahead.

    Errors of the iterator are raised here. Closing this generator, or leaving it by an exception, stops the
    thread. A thread and not a process: forked workers hang or abort with several array stores.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                if not _put(ready, item, stop):
                    return
            _put(ready, _END, stop)
        except BaseException as error:  # the consumer raises it
            _put(ready, error, stop)

    thread = threading.Thread(target=produce, name="kd-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def prefetch_map(
    function: Callable[[T], R], items: Iterator[T], depth: int, n_threads: int = 1
) -> Generator[R, None, None]:
    """Do the same with ``map(function, items)``, where several threads may call the function at once.

    Order is kept, and only one thread runs the iterator.
    """
    if n_threads == 1:
        yield from prefetch(map(function, items), depth)
        return
    source = prefetch(items, depth)
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(n_threads, "kd-prefetch") as pool:
        try:
            for item in source:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            source.close()


def _put(ready: "queue.Queue[Any]", item: object, stop: threading.Event) -> bool:
    """Wait for room unless the consumer has gone; return whether the item was delivered."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
        return True
    return False


class Background:
    """One thread that does what it is given, in order, while the caller goes on; leaving waits for all of it.

    Parameters
    ----------
    name : of the thread
    depth : jobs that may wait; with more, `submit` waits for the oldest
    """

    def __init__(self, name: str, depth: int) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._depth = depth
        self._pending: deque[Future[object]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._pending and error is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(wait=True)

    def submit(self, job: Callable[[], object]) -> None:
        """Queue a job; what an earlier one raised is raised here, or when leaving."""
        self._pending.append(self._pool.submit(job))
        while len(self._pending) > self._depth or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def settle(self) -> None:
        """Wait until nothing is running, whatever came of it."""
        wait(self._pending)
