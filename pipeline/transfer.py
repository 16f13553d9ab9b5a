"""Batches to the device and signals back without waiting; on a CPU nothing is copied and nothing waits."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from molkd.pipeline.graphs.batch import Batch


def pin(batch: Batch) -> Batch:
    """Return the batch in page-locked memory: copies from there to CUDA run beside everything else."""
    return Batch(*(t.pin_memory() for t in batch))


class HostCopy:
    """Tensors on their way to the host: begun when made, there when `wait` returns.

    On CUDA the copy runs on a stream of its own into page-locked buffers, which torch keeps and gives out
    again, so that the next batch is computed meanwhile.
    """

    def __init__(self, tensors: Mapping[str, Tensor], stream: torch.cuda.Stream | None) -> None:
        self._event: torch.cuda.Event | None = None
        if stream is None:
            self._tensors = dict(tensors)
            return
        self._tensors = {
            name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()
        }
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for name, t in tensors.items():
                self._tensors[name].copy_(t, non_blocking=True)
                t.record_stream(stream)  # its memory is not given to others before the copy is done
            self._event = stream.record_event()

    def wait(self) -> dict[str, NDArray[Any]]:
        """Return the values on the host."""
        if self._event is not None:
            self._event.synchronize()
        return {name: t.numpy() for name, t in self._tensors.items()}


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for copies to the host; None where the device is the host."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
