"""The process of one run of a study: ``python -m molkd.pipeline.study.child``.

Its first line of input is the job, as JSON; its last line of output the answer. It stops at a checkpoint on
SIGTERM and when its input ends, as it does when whoever started it has died.
"""

import json
import logging
import os
import signal
import sys
import threading
from typing import Any

import torch

from molkd.pipeline.allocator import keep_freed_memory
from molkd.pipeline.config import TrainConfig
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import BusyError, DivergedError, MolkdError

_INPUT = 0


def main() -> None:
    """Do the job; an error that nobody expected ends the process with a traceback."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    job = json.loads(_first_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("molkd").setLevel(logging.INFO)  # the run's log.txt holds it
    keep_freed_memory()
    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    answers.write(json.dumps(answer_of(TrainConfig.model_validate(job["config"]))) + "\n")
    answers.flush()


def answer_of(config: TrainConfig) -> dict[str, Any]:
    """Train and say how it ended: finished, interrupted, busy (somebody else is at it), or failed."""
    try:
        summary = train_student(config)
    except BusyError:
        return {"ended": "busy"}
    except DivergedError as error:
        return {"ended": "failed", "kind": "diverged", "reason": str(error)}
    except torch.OutOfMemoryError as error:
        found = str(error).splitlines()[0]
        reason = f"{config.out}: {found}; lower training.batch_size, or take fewer --jobs"
        return {"ended": "failed", "kind": "error", "reason": reason}
    except (MolkdError, OSError) as error:
        return {"ended": "failed", "kind": "error", "reason": str(error)}
    return {"ended": "finished" if summary.finished else "interrupted"}


def _first_line() -> bytes:
    """Read the job; unbuffered, as a thread that waits in a buffer aborts the interpreter when it ends."""
    line = b""
    while not line.endswith(b"\n"):
        if not (piece := os.read(_INPUT, 1 << 16)):
            sys.exit("no job came")
        line += piece
    return line


def _end_with_parent() -> None:
    while os.read(_INPUT, 1 << 16):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
