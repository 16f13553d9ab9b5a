"""Throughput of several models under equal conditions: the same systems, in turns, model only and end to end.

What else runs on the machine, clocks and temperature change within minutes. Models that take turns meet the
same changes; their speeds compare, where those of evaluations made one after the other may not.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from molkd.pipeline.data.sources import Source
from molkd.pipeline.data.system import System
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation.throughput import Speed, Throughput, conditions_of, timed, warm_up
from molkd.pipeline.graphs.batch import Batch, batch_from_systems, to_device
from molkd.pipeline.graphs.neighbors import NeighborRule

log = logging.getLogger(__name__)

MAX_BATCHES = 8  # other systems have other numbers of atoms
MIN_ROUNDS, MAX_ROUNDS = 5, 25
SECONDS = 10.0  # a model, about
_BUSY = 0.8  # below this share of a CPU others took part of it
_TURN_SECONDS = 0.15  # of model time in one turn at least: a clock and a scheduler are not exact


@dataclass(frozen=True, eq=False)
class Contender:
    """A model that takes part."""

    name: str
    predict: Callable[[Batch], Mapping[str, Tensor]]
    rule: NeighborRule
    device: torch.device
    dtype: torch.dtype = torch.float32


def measure_in_turns(
    contenders: Sequence[Contender],
    systems: Sequence[System],
    *,
    batch_size: int = 32,
    seconds: float = SECONDS,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Speed]:
    """Return the throughput of each model by its name.

    In every round each model goes over the same batches, once and again until its turn is long enough; who
    begins moves on from round to round. The spread is that over rounds.

    Parameters
    ----------
    systems : cut into full batches, of which at most MAX_BATCHES are used, fewer if models are slow; too few
        systems for one batch make a smaller one
    seconds : about as long is spent on each model, but at least MIN_ROUNDS rounds over one batch
    on_round : called with the number of rounds done and of all

    Raises
    ------
    ConfigError
        If two models have the same name, or there is no system.
    """
    if len({c.name for c in contenders}) < len(contenders) or not systems:
        raise ConfigError("throughput: give every model once, and data that hold systems")
    size = min(batch_size, len(systems))
    chunks = [systems[i : i + size] for i in range(0, len(systems) - size + 1, size)][:MAX_BATCHES]
    budget = seconds * len(contenders)
    with torch.no_grad():
        turns = [_Turn(contender, chunks[:1]) for contender in contenders]
        seconds_a_batch = sum(turn.warm_up() for turn in turns)
        n_batches = int(np.clip(budget / (MIN_ROUNDS * seconds_a_batch), 1, len(chunks)))
        if n_batches > 1:
            turns = [_Turn(contender, chunks[:n_batches]) for contender in contenders]
            for turn in turns:
                turn.warm_up()
        n_rounds = int(np.clip(budget / sum(turn.seconds for turn in turns), MIN_ROUNDS, MAX_ROUNDS))
        wall, used = time.perf_counter(), time.process_time()
        for number in range(n_rounds):
            first = number % len(turns)
            for turn in turns[first:] + turns[:first]:
                turn.take()
            if on_round is not None:
                on_round(number + 1, n_rounds)
    share = (time.process_time() - used) / (time.perf_counter() - wall)
    if contenders[0].device.type == "cpu" and share < _BUSY:
        log.warning(
            "throughput: this process had a CPU in %.0f %% of the time only, other programs in the rest; "
            "the speeds are too low, their ratios less so",
            100 * share,
        )
    return {turn.contender.name: turn.speed() for turn in turns}


class _Turn:
    """The batches of one model and the rates of its turns."""

    def __init__(self, contender: Contender, chunks: Sequence[Sequence[System]]) -> None:
        self.contender, self._chunks = contender, chunks
        self._batches = [self._batch(chunk) for chunk in chunks]
        self._n_systems = sum(map(len, chunks))
        self._works = (self._predict_all, self._end_to_end)
        self._n_passes = [1, 1]
        self.seconds = 0.0  # of a turn, about
        self._rates: tuple[list[float], list[float]] = ([], [])

    def warm_up(self) -> float:
        """Go over everything without counting; return the seconds of going over it once, in both ways."""
        warm_up(lambda: self.contender.predict(self._batches[0]), self.contender.device)
        self._predict_all()
        seconds = [self._time(work, 1) for work in self._works]
        self._n_passes = [int(np.ceil(_TURN_SECONDS / s)) for s in seconds]
        self.seconds = sum(n * s for n, s in zip(self._n_passes, seconds, strict=True))
        return sum(seconds)

    def take(self) -> None:
        """Time the model alone and end to end."""
        for rates, work, n_passes in zip(self._rates, self._works, self._n_passes, strict=True):
            rates.append(n_passes * self._n_systems / self._time(work, n_passes))

    def _time(self, work: Callable[[], None], n_passes: int) -> float:
        def repeat() -> None:
            for _ in range(n_passes):
                work()

        return timed(repeat, self.contender.device)[1]

    def speed(self) -> Speed:
        """Return median and spread over the turns."""
        n_atoms = sum(batch.n_atoms for batch in self._batches) / self._n_systems
        dtype = self._batches[0].positions.dtype
        conditions = conditions_of(self.contender.device, len(self._chunks[0]), n_atoms, dtype)
        return Speed(*(Throughput.of(rates, conditions) for rates in self._rates))

    def _batch(self, chunk: Sequence[System]) -> Batch:
        batch = batch_from_systems(chunk, self.contender.rule, self.contender.dtype)
        return to_device(batch, self.contender.device)

    def _predict_all(self) -> None:
        for batch in self._batches:
            self.contender.predict(batch)

    def _end_to_end(self) -> None:
        for chunk in self._chunks:
            output = self.contender.predict(self._batch(chunk))
            for name in ("energy", "forces"):
                output[name].detach().cpu()


def sample_systems(sources: Sequence[Source], n: int, seed: int = 0) -> Iterator[System]:
    """Yield n systems, or all if there are fewer, drawn at random from all sources."""
    ends = np.cumsum([len(source) for source in sources])
    total = int(ends[-1])
    for index in np.random.default_rng(seed).permutation(total)[: min(n, total)]:
        which = int(np.searchsorted(ends, index, side="right"))
        yield sources[which].read(int(index - (ends[which - 1] if which else 0)))
