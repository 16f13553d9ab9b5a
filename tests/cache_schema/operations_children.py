"""Calls that are killed or refused, and files that are damaged, for test_operations.py."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from molkd.cache_schema.errors import MolkdError

CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}


def in_child(act: Callable[[], object], kill_at: int) -> bool:
    """Do it in a forked process that is killed before its n-th change on disk; return whether it was."""
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests take no part in this
        pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            flags = arguments[2] if event == "open" else 0
            if event in CHANGES or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_CREAT)):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            act()
            code = 0
        except BaseException:
            os.write(send, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive) as text:
        said = text.read()
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, said
    return killed


def refusal(act: Callable[[], object]) -> str:
    """Do it and return the message if it is refused."""
    try:
        act()
    except MolkdError as error:
        return str(error) or "refused"
    return ""


def damaged_bytes(raw: bytes, place: int, how: str, files: list[Path]) -> bytes | None:
    """Return other bytes of a file; None if it is removed."""
    if how == "remove":
        return None
    if how == "cut":
        return raw[: place % max(len(raw), 1)]
    if how == "mix":
        same = [path.read_bytes() for path in files if path.stat().st_size == len(raw)]
        return same[place % len(same)]
    changed = bytearray(raw)
    if raw:
        bit = place * 7919 % (8 * len(raw))
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
