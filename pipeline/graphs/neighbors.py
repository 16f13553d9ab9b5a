"""The neighbour rule, written once for both stages."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NeighborRule:
    """Which pairs of atoms see each other. Recorded in the cache's manifest and in every model file."""

    cutoff: float  # A
    max_neighbors: int | None = None  # per center the nearest K; None keeps all
    tie_tolerance: float = 0.0  # A; > 0 also keeps everything this close behind the K-th neighbor
    symmetrize: bool = False  # OCP's PaiNN and GemNet-OC: the higher atom's list decides, edges are mirrored
    use_pbc: bool = True  # False ignores cell and pbc

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def neighbor_list(
    positions: NDArray[np.floating], cell: NDArray[np.floating], pbc: NDArray[np.bool_], rule: NeighborRule
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return edge_index (2, E) and shifts (E, 3) of one system."""
    raise NotImplementedError
