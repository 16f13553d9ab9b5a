"""What every model is: a torch module from a Batch to a dictionary of named outputs.

Keys of the dictionary are the names of the signals (docs/conventions.md):

=================  ==========  ======  ==================================================
key                shape       unit    meaning
=================  ==========  ======  ==================================================
energy             (S,)        eV*     sum of the atomic energies
forces             (N, 3)      eV/A*   direct head, or minus the gradient of the energy
atomic_energies    (N,)        eV*     energy head before the sum
node               (N, C)      1       scalar features that the energy head reads (n2n)
v2v                (N, 3, C)   1       vector features, models that have them
e2n                (N, C)      1       edge features summed at their receivers, on request
edge               (E, C)      1       edge features, on request; with them come
edge_index         (2, E)      1       their sender and receiver, and
edge_shift         (E, 3)      1       the sender's image, both as in Batch
layer/<tap>        (N, C)      1       features inside the model, on request; (N, 3, C) where
                                       `signals` declares vectors
=================  ==========  ======  ==================================================

What is on request comes only if `taps` names it (edge_index and edge_shift with "edge").

(*) of the normalised labels; `molkd.pipeline.models.potential` turns them into eV and eV/A.
"""

from collections.abc import Collection
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.graphs.batch import Batch
from molkd.pipeline.graphs.neighbors import NeighborRule

Outputs = dict[str, Tensor]


@runtime_checkable
class Model(Protocol):
    """The contract that tests/models/test_contract.py checks for every entry of MODELS."""

    neighbor_rule: NeighborRule  # of the batch's edges
    edge_rule: NeighborRule  # of the edges that `edge` is given for: the same, or picked from the batch's
    forces_from: Literal["direct", "gradient"]
    max_atomic_number: int  # the largest Z the embedding knows

    @property
    def signals(self) -> dict[str, FieldSpec]:
        """Everything `forward` can give, by name."""
        ...

    def __call__(self, batch: Batch, taps: Collection[str] = (), *, forces: bool = True) -> Outputs:
        """Return energy, atomic_energies, node, (v2v), what `taps` asks for and, unless unwanted, forces."""
        ...
