"""Batches of several stores: how many systems come from each, and how much each counts (Eqs. 9 to 11)."""

from collections.abc import Sequence
from dataclasses import dataclass

from molkd.pipeline.errors import ConfigError


def origin_weights(counts: Sequence[int], ratios: Sequence[float]) -> tuple[float, ...]:
    """Return the loss weights of the origins of a batch: the main store first, then the further ones.

    Eq. 9 asks for w_j = k_j w_main and a mean weight of one over the batch. With r_j, the share of the batch,
    w_main = 1 / (1 - sum r_j + sum k_j r_j) follows (Eqs. 10, 11). The paper's words have r as a ratio of
    synthetic to DFT samples; but only with the share is the mean one, and the official code takes that.

    Parameters
    ----------
    counts : systems in the batch, of the main store and of each further one
    ratios : k of each further store
    """
    of_main = sum(counts) / (counts[0] + sum(n * k for n, k in zip(counts[1:], ratios, strict=True)))
    return (of_main, *(k * of_main for k in ratios))


def batch_counts(batch_size: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return how many systems of a batch come from the main store and from each further one.

    Shares are rounded to whole systems, halves up, but never to none; the main store gives the rest.

    Raises
    ------
    ConfigError
        If nothing is left for the main store.
    """
    extra = [max(1, int(share * batch_size + 0.5)) for share in shares]
    if sum(extra) >= batch_size:
        raise ConfigError(
            f"a batch of {batch_size} systems with {sum(extra)} from --mix leaves none for the main store; "
            "lower --mix-share or raise --batch-size"
        )
    return (batch_size - sum(extra), *extra)


@dataclass(frozen=True)
class Composition:
    """How an epoch, one pass over the main store, is made of batches.

    Only the last batch of an epoch may be smaller; it takes of each further store in proportion, at least
    one system. Of each origin the systems used are one endless stream, so every place in it is a number.

    Attributes
    ----------
    n_main : systems of the main store
    full : systems of a full batch, by origin
    """

    n_main: int
    full: tuple[int, ...]

    @property
    def n_batches(self) -> int:
        """Batches of an epoch."""
        return -(-self.n_main // self.full[0])

    def count(self, origin: int, batch: int) -> int:
        """Return the systems of an origin in a batch of an epoch."""
        n, n_main = self.full[origin], self.n_main - batch * self.full[0]
        if n_main >= self.full[0]:
            return n
        return n_main if origin == 0 else max(1, (2 * n * n_main + self.full[0]) // (2 * self.full[0]))

    def place(self, origin: int, epoch: int, batch: int) -> int:
        """Return how many systems of an origin are used before a batch."""
        before_last = (self.n_batches - 1) * self.full[origin]
        an_epoch = before_last + self.count(origin, self.n_batches - 1)
        return epoch * an_epoch + min(batch * self.full[origin], an_epoch)
