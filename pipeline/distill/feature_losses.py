"""Losses on relations between atoms: CKA, global and local structure preserving (GSP, LSP; Appendix E).

They compare how atoms lie to each other among the student's features and among the teacher's, so both may
have any width: head identity is always possible, linear learns which part of the student is compared.
Features are scalars (N, C), or vectors (N, 3, C), which count as 3C numbers: their distances stay when a
system turns.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from molkd.pipeline.distill.losses import Weights
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.graphs.batch import Batch
from molkd.pipeline.models.blocks import full_precision, sum_at
from molkd.pipeline.similarity import MIN_ROWS, cka

_MAX_PAIRS = 2**24  # of atoms, held at once: five matrices of 64 MiB


def structure_loss(
    kind: str,
    mapped: Float[Tensor, "N ..."],
    target: Float[Tensor, "N ..."],
    batch: Batch,
    weights: Weights | None = None,
) -> Tensor:
    """Return the loss `kind` (cka, gsp or lsp) of features of the batch's atoms, in float32 in any case.

    Parameters
    ----------
    weights : how much systems count

    Raises
    ------
    ConfigError
        If cka is to weigh systems: it has no term for each of them.
    """
    mapped, target = mapped.float(), target.float()
    with full_precision(mapped):
        if kind == "cka":
            if weights is not None:
                raise ConfigError("loss cka cannot weigh systems by origin; take mse, gsp or lsp")
            return cka_loss(mapped, target)
        if kind == "gsp":
            return gsp_loss(mapped, target, batch.system_idx, batch.n_systems, weights and weights.systems)
        return lsp_loss(mapped, target, batch.edge_index, weights and weights.atoms)


def cka_loss(mapped: Float[Tensor, "N C"], target: Float[Tensor, "N D"]) -> Tensor:
    """1 - linear CKA over the atoms of the batch: 0 for equal features, 1 for unrelated ones; no normaliser.

    The unbiased estimate of `molkd.pipeline.similarity`, which may fall below 0, so the loss may exceed 1
    (the public port of the paper's code takes the biased one). It needs 4 atoms; the loss of a smaller batch
    is 0. Rotations of the channels, one factor for all of them and one offset for all atoms leave it
    unchanged, for either side.
    """
    if len(mapped) < MIN_ROWS:
        return mapped.sum() * 0
    return 1 - cka(_of_unit_size(mapped), _of_unit_size(target))


def gsp_loss(
    mapped: Float[Tensor, "N ..."],
    target: Float[Tensor, "N ..."],
    system_idx: Int[Tensor, " N"],
    n_systems: int,
    weights: Float[Tensor, " S"] | None = None,
) -> Tensor:
    """Squared difference of distances, mean over the n x n pairs of a system's atoms, then over systems.

    A distance is the mean over channels (and x, y, z) of squared differences, d_ij = |x_i - x_j|^2 / C. Joshi
    et al. (arXiv:2111.04964) preserve a similarity of choice; this one, within systems, is that of the public
    port of the paper's code. An atom and itself count as a pair, of distance zero.

    All N x N pairs of the batch are formed, which is one product of matrices and needs no size of a system on
    the host; above `_MAX_PAIRS` in blocks of rows, which the backward pass computes again.
    """
    n_atoms = sum_at(system_idx, torch.ones_like(system_idx, dtype=mapped.dtype), n_systems)  # (S,)
    share = (1 if weights is None else weights) / n_atoms.square().clamp(min=1)  # (S,)
    x, y = (_centered(f, system_idx, n_atoms) for f in (mapped, target))
    arguments = (x, y, system_idx, share[system_idx])
    n_rows = max(1, _MAX_PAIRS // max(1, len(x)))
    if n_rows >= len(x):
        return _pair_errors(*arguments, 0, len(x)) / n_systems
    total = mapped.new_zeros(())
    for begin in range(0, len(x), n_rows):
        total = total + checkpoint(_pair_errors, *arguments, begin, begin + n_rows, use_reentrant=False)
    return total / n_systems


def lsp_loss(
    mapped: Float[Tensor, "N ..."],
    target: Float[Tensor, "N ..."],
    edge_index: Int[Tensor, "2 E"],
    weights: Float[Tensor, " N"] | None = None,
) -> Tensor:
    """Divergence of how an atom's neighbors share its edges, KL(teacher, student), mean over the N atoms.

    The shares are the softmax over an atom's incoming edges of the Euclidean distances |x_i - x_j| (Yang et
    al. 2020, arXiv:2003.10477; this measure as in the public port of the paper's code, which divides by the
    number of edges). Atoms with fewer than two edges add nothing.
    """
    student, teacher = (_log_shares(features, edge_index) for features in (mapped, target))
    divergence = teacher.exp() * (teacher - student)  # (E,)
    if weights is not None:
        divergence = divergence * weights.index_select(0, edge_index[1])
    return divergence.sum() / max(1, len(mapped))


def _of_unit_size(features: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Subtract the mean row and divide by the size of the rest: fourth powers stay within float32."""
    centered = features - features.mean(0)
    size = centered.detach().square().mean().sqrt()
    return centered / size.clamp(min=torch.finfo(size.dtype).tiny)


def _centered(
    features: Float[Tensor, "N ..."], system_idx: Int[Tensor, " N"], n_atoms: Float[Tensor, " S"]
) -> Float[Tensor, "N C"]:
    """Subtract each system's mean: distances stay, and keep more digits."""
    flat = features.flatten(1)
    mean = sum_at(system_idx, flat.detach(), len(n_atoms)) / n_atoms.clamp(min=1).unsqueeze(1)  # (S, C)
    return flat - mean.index_select(0, system_idx)


def _pair_errors(
    x: Float[Tensor, "N C"],
    y: Float[Tensor, "N D"],
    system_idx: Int[Tensor, " N"],
    share: Float[Tensor, " N"],
    begin: int,
    end: int,
) -> Tensor:
    """Sum over rows begin to end of share x squared errors of the distances within the row's system."""
    x, y = x * math.sqrt(2 / x.shape[1]), y * math.sqrt(2 / y.shape[1])
    own = (x.square().sum(1) - y.square().sum(1)) / 2  # (N,)
    products = torch.addmm(x[begin:end] @ x.T, y[begin:end], y.T, alpha=-1)  # (R, N)
    error = own[begin:end, None] + own[None] - products
    same = system_idx[begin:end, None] == system_idx[None]
    return ((error * same).square().sum(1) * share[begin:end]).sum()


def _log_shares(features: Float[Tensor, "N ..."], edge_index: Int[Tensor, "2 E"]) -> Float[Tensor, " E"]:
    """Log of the softmax of distances over the edges that end at an atom."""
    sender, receiver = edge_index
    flat = features.flatten(1)
    difference = flat.index_select(0, sender) - flat.index_select(0, receiver)  # (E, C)
    # The root's derivative at zero is infinite; an atom and its own periodic image are that close.
    distance = difference.square().sum(1).clamp(min=1e-24).sqrt()  # (E,)
    largest = flat.new_zeros(len(flat)).scatter_reduce(0, receiver, distance.detach(), "amax")  # (N,)
    shifted = distance - largest.index_select(0, receiver)
    return shifted - sum_at(receiver, shifted.exp(), len(flat)).index_select(0, receiver).log()
