"""Minibatch CKA (Nguyen et al. 2020): features of many atoms compared batch by batch, in float64 sums.

Section 4 and Appendix F of the paper. For every pair of features the unbiased HSIC_1 of `pipeline.similarity`
is summed over batches of atoms, with itself and with the other, and only then divided:

    CKA = sum HSIC_1(X, Y) / sqrt(sum HSIC_1(X, X) sum HSIC_1(Y, Y)).

HSIC_1 is unbiased, so the sums converge to the same ratio whatever the size of the batches.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molkd.pipeline.similarity import MIN_ROWS, hsic, hsic_table, normalized

BATCH_ATOMS = 512
_WINDOW_BATCHES = 16  # batches' worth of atoms that are shuffled together
_CONSTANT = 1e-12  # (1e-6)^2: a smaller part of the squares than this is the rounding of float32


class CKASums:
    """Running sums of HSIC_1 over batches, for each of R features against each of C others."""

    def __init__(self) -> None:
        self.n_atoms = 0
        self.n_batches = 0
        self._cross = torch.zeros(1, 1, dtype=torch.float64)  # (R, C) HSIC_1
        # (3, R) and (3, C): HSIC_1 of each feature with itself, squares about the mean of a batch, squares
        self._own = [torch.zeros(3, 1, dtype=torch.float64) for _ in range(2)]

    def add(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        """Count one batch: features (n, ...) of the same n atoms; n at least MIN_ROWS."""
        sides = [[f.detach().cpu().double() for f in side] for side in (rows, columns)]
        self._cross = self._cross + hsic_table(*sides)
        own = [torch.stack([_own(f) for f in side], 1) for side in sides]
        self._own = [old + new for old, new in zip(self._own, own, strict=True)]
        self.n_atoms += len(sides[0][0])
        self.n_batches += 1

    def values(self) -> NDArray[np.float64]:
        """Return CKA (R, C), 0 to 1 but for noise; NaN for features that are equal at all atoms."""
        x, y = self._own
        varies = [spread > _CONSTANT * squares for _, spread, squares in self._own]
        cka = normalized(self._cross, *torch.broadcast_tensors(x[0][:, None], y[0]))
        values: NDArray[np.float64] = cka.where(varies[0][:, None] & varies[1], torch.nan).numpy()
        return values


def _own(feature: Tensor) -> Tensor:
    spread = (feature - feature.mean(0)).square().sum()
    return torch.stack([hsic(feature, feature), spread, feature.square().sum()])


def atom_batches(
    blocks: Iterable[Sequence[Tensor]],
    rng: np.random.Generator,
    *,
    batch_atoms: int = BATCH_ATOMS,
) -> Iterator[list[Tensor]]:
    """Cut a stream of features into batches of randomly mixed atoms.

    Atoms of one system are alike and lie beside each other in the stream: batches of whole systems would
    count pairs within a system too often. So a window of many batches' worth of atoms is shuffled at a time,
    which bounds the memory; a smaller stream is shuffled as a whole.

    Parameters
    ----------
    blocks : features (n, ...) of the same n atoms, several kinds, in the same order in every block
    batch_atoms : of a batch, at least; less than twice as many unless the stream is shorter

    Yields
    ------
    list
        The same kinds for at least MIN_ROWS atoms; nothing from a stream of fewer.
    """
    window = _WINDOW_BATCHES * batch_atoms
    held: list[Sequence[Tensor]] = []
    n_held = 0
    for block in blocks:
        held.append(block)
        n_held += len(block[0])
        if n_held >= 2 * window:
            features = _shuffled(held, rng)
            yield from _cut([f[:window] for f in features], batch_atoms)
            held, n_held = [[f[window:] for f in features]], n_held - window
    if n_held >= MIN_ROWS:
        yield from _cut(_shuffled(held, rng), batch_atoms)


def _shuffled(blocks: Sequence[Sequence[Tensor]], rng: np.random.Generator) -> list[Tensor]:
    features = [torch.cat(kind) for kind in zip(*blocks, strict=True)]
    order = torch.from_numpy(rng.permutation(len(features[0])))
    return [f[order] for f in features]


def _cut(features: Sequence[Tensor], batch_atoms: int) -> Iterator[list[Tensor]]:
    """Yield batches that are equally long but for one atom."""
    n = len(features[0])
    for part in zip(*(f.tensor_split(max(n // batch_atoms, 1)) for f in features), strict=True):
        yield list(part)
