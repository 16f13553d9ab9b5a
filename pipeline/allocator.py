"""Keeps freed memory in the process: a model on a CPU asks for the same megabytes again in a moment."""

import ctypes
import sys

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT = 1 << 30  # bytes at the heap's end that are not handed back
_LARGEST = 1 << 25  # bytes; glibc refuses more


def keep_freed_memory() -> bool:
    """Ask the C library not to return freed tensors to the system; True if it will comply.

    By default glibc hands every large block back and gets it again page by page, which cost 40 to 50 % of
    PaiNN-small's forward pass and 10 to 30 % of its training step. Meant for programs, called once before
    the first step: it holds for the whole process. Elsewhere than on Linux with glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
