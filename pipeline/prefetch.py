"""One thread that stays a few items ahead of whoever consumes them."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

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


def _put(ready: "queue.Queue[Any]", item: object, stop: threading.Event) -> bool:
    """Wait for room unless the consumer has gone; return whether the item was delivered."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
        return True
    return False
