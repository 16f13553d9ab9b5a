"""Systems per second with what the number depends on: device, threads, batch, atoms, precision, versions."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molkd.pipeline.device import synchronize
from molkd.pipeline.graphs.batch import Batch

WARM_UP_CALLS = 3
WARM_UP_SECONDS = 1.0  # no further warm-up call is begun after it
MIN_REPEATS = 5
REPEAT_SECONDS = 3.0  # of repeating a batch where the data have fewer than MIN_REPEATS full ones


@dataclass(frozen=True)
class Conditions:
    """What a throughput depends on beside the model."""

    device: str  # name of the GPU or CPU
    n_threads: int | None  # of the CPU; None on a GPU
    batch_size: int
    atoms_per_system: float
    dtype: str
    torch: str  # version


@dataclass(frozen=True)
class Throughput:
    """Systems per second: the median of repeats, and the quartiles around it."""

    median: float
    lower_quartile: float
    upper_quartile: float
    n_repeats: int
    conditions: Conditions

    @classmethod
    def of(cls, rates: Sequence[float], conditions: Conditions) -> "Throughput":
        """Summarise rates in systems per second, at least one."""
        low, middle, high = np.quantile(np.asarray(rates, np.float64), (0.25, 0.5, 0.75)).tolist()
        return cls(middle, low, high, len(rates), conditions)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Throughput":
        """Read what `to_dict` gave."""
        return cls(**{**plain, "conditions": Conditions(**plain["conditions"])})

    def text(self) -> str:
        """Return "12.3 (11.9 to 12.6 in half of 9 repeats)"."""
        low, high = f"{self.lower_quartile:.3g}", f"{self.upper_quartile:.3g}"
        return f"{self.median:.3g} ({low} to {high} in the middle half of {self.n_repeats} repeats)"


@dataclass(frozen=True)
class Speed:
    """Throughput of one model, measured in turns with others."""

    model: Throughput  # batches with their neighbour lists are on the device already
    end_to_end: Throughput  # from structures on the host to energies and forces there, one step after another

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"model": self.model.to_dict(), "end_to_end": self.end_to_end.to_dict()}


class ThroughputMeter:
    """Times the batches of an evaluation.

    Every full batch is a repeat, after up to WARM_UP_CALLS uncounted calls on the first one. Where the data
    have fewer than MIN_REPEATS full batches the first is repeated, for REPEAT_SECONDS at most.
    """

    def __init__(self, predict: Callable[[Batch], Any], device: torch.device) -> None:
        self._predict, self._device = predict, device
        self._first: Batch | None = None
        self._rates: list[float] = []
        self._n_systems = self._n_atoms = 0

    def predict(self, batch: Batch) -> Any:
        """Return what the model gives for a batch, and count the time if the batch is full."""
        if self._first is None:
            self._first = batch
            warm_up(lambda: self._predict(batch), self._device)
        output, seconds = timed(lambda: self._predict(batch), self._device)
        if batch.n_systems == self._first.n_systems:
            self._count(batch, seconds)
        return output

    def result(self) -> Throughput:
        """Repeat what is too short for a spread, and return the throughput; at least one batch was timed."""
        assert self._first is not None
        batch, begin = self._first, time.perf_counter()
        while len(self._rates) < MIN_REPEATS and time.perf_counter() - begin < REPEAT_SECONDS:
            _, seconds = timed(lambda: self._predict(batch), self._device)
            self._count(batch, seconds)
        n_atoms = self._n_atoms / self._n_systems
        return Throughput.of(
            self._rates, conditions_of(self._device, batch.n_systems, n_atoms, batch.positions.dtype)
        )

    def _count(self, batch: Batch, seconds: float) -> None:
        self._rates.append(batch.n_systems / seconds)
        self._n_systems += batch.n_systems
        self._n_atoms += batch.n_atoms


def warm_up(call: Callable[[], object], device: torch.device) -> None:
    """Call so often that caches are filled, kernels chosen and clocks up, without waiting for slow models."""
    begin = time.perf_counter()
    for _ in range(WARM_UP_CALLS):
        call()
        synchronize(device)
        if time.perf_counter() - begin > WARM_UP_SECONDS:
            break


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return the result of a call and its seconds on the device."""
    synchronize(device)
    begin = time.perf_counter()
    output = call()
    synchronize(device)  # kernels run behind the host: without it only their launch would be timed
    return output, max(time.perf_counter() - begin, 1e-9)


def conditions_of(
    device: torch.device, batch_size: int, atoms_per_system: float, dtype: torch.dtype
) -> Conditions:
    """Describe this process and device."""
    on_cpu = device.type == "cpu"
    return Conditions(
        device=device_name(device),
        n_threads=torch.get_num_threads() if on_cpu else None,
        batch_size=batch_size,
        atoms_per_system=atoms_per_system,
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
    )


def device_name(device: torch.device) -> str:
    """Return the maker's name of a GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "CPU"
