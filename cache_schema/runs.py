"""Which rows to read and where they go: merged where they follow one another in a file."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Run(NamedTuple):
    """Rows that follow one another in a shard's file."""

    shard: int
    row: int  # the first, within the shard
    n_rows: int
    places: tuple[
        tuple[int, int], ...
    ]  # [first, last) rows of the result that they fill, one after the other


class Runs(NamedTuple):
    """What one read fetches from each array of an axis, in the order of files."""

    n_rows: int  # of the result
    runs: list[Run]


def find_runs(begin: NDArray[np.int64], count: NDArray[np.int64], rows_per_file: int) -> Runs:
    """Return the runs of rows [begin, begin + count), (R,) each, one result after the other.

    The rows of a pair lie in one shard.
    """
    ends = count.cumsum()
    n_rows = int(ends[-1]) if len(ends) else 0
    order = begin.argsort(kind="stable")
    if not count.all():
        order = order[count[order] > 0]
    begin, count, ends = begin[order], count[order], ends[order]
    shard = begin // rows_per_file
    row = begin - shard * rows_per_file
    follows = (row[1:] == row[:-1] + count[:-1]) & (shard[1:] == shard[:-1])
    columns = zip(shard.tolist(), row.tolist(), count.tolist(), ends.tolist(), strict=True)
    alone = [Run(s, r, n, ((end - n, end),)) for s, r, n, end in columns]
    if not follows.any():
        return Runs(n_rows, alone)
    cuts = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(alone)]
    return Runs(n_rows, [_merge(alone[first:last]) for first, last in pairwise(cuts)])


def _merge(runs: list[Run]) -> Run:
    """Return one run for several that follow one another."""
    places: list[tuple[int, int]] = []
    for run in runs:
        ((begin, end),) = run.places
        if places and places[-1][1] == begin:
            places[-1] = (places[-1][0], end)
        else:
            places.append((begin, end))
    return Run(runs[0].shard, runs[0].row, sum(run.n_rows for run in runs), tuple(places))
