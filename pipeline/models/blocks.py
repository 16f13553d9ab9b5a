"""What several architectures share: Gaussian basis, sums over edges and atoms, forces by gradient."""

from collections.abc import Callable, Collection, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from molkd.pipeline.graphs.batch import Batch
from molkd.pipeline.models.matmul import Linear


class GaussianSmearing(nn.Module):
    """Gaussians on an even grid of centers over [0, stop]."""

    offset: Tensor

    def __init__(self, stop: float, n_gaussians: int) -> None:
        super().__init__()
        offset = torch.linspace(0, stop, n_gaussians, dtype=torch.float32)
        # The spacing is read back from the rounded centers, as in the peer: trained weights know that width.
        self.coefficient = -0.5 / float(offset[1] - offset[0]) ** 2
        self.register_buffer("offset", offset)

    def forward(self, distance: Float[Tensor, " E"]) -> Float[Tensor, "E K"]:
        """Expand distances, in the unit of `stop`."""
        return torch.exp(self.coefficient * (distance.unsqueeze(1) - self.offset).square())  # (E, K)


def linear(n_in: int, n_out: int, *, bias: bool = True) -> Linear:
    """Linear layer with Glorot weights and zero bias."""
    layer = Linear(n_in, n_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def sum_at(index: Int[Tensor, " M"], values: Float[Tensor, "M ..."], n_rows: int) -> Float[Tensor, "R ..."]:
    """Sum rows of `values` that share an index: edges at their receiver, atoms in their system.

    Half-precision values are added up in float32.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    total = torch.zeros((n_rows, *values.shape[1:]), dtype=dtype, device=values.device)
    return total.index_add(0, index, values.to(dtype))


def full_precision(x: Tensor) -> torch.autocast:
    """Switch mixed precision off: a head in bfloat16 would round an energy of 10 eV to 0.03 eV."""
    return torch.autocast(x.device.type, enabled=False)


def with_gradient_forces(
    predict: Callable[[Batch, Collection[str]], dict[str, Tensor]],
    batch: Batch,
    taps: Collection[str],
    parameters: Iterable[Tensor],
) -> dict[str, Tensor]:
    """Run `predict` and add ``forces = -dE/dpositions``, in eV/A of the labels' scale, shape (N, 3).

    Works under `torch.no_grad` too. The graph for a second derivative (a loss on forces) is kept only when
    the caller records gradients and something can receive them; otherwise all outputs come detached.

    Parameters
    ----------
    predict : function from batch and taps to the model's outputs without forces
    batch : Batch
    taps : names of features asked for
    parameters : the model's, trainable or not
    """
    takes_gradient = batch.positions.requires_grad or any(p.requires_grad for p in parameters)
    keep_graph = torch.is_grad_enabled() and takes_gradient
    with torch.enable_grad():
        positions = batch.positions
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_()
        outputs = predict(batch._replace(positions=positions), taps)
        (gradient,) = torch.autograd.grad(outputs["energy"].sum(), positions, create_graph=keep_graph)
    outputs["forces"] = -gradient
    return outputs if keep_graph else {name: value.detach() for name, value in outputs.items()}


def energy_gradient(
    outputs: dict[str, Tensor], positions: Float[Tensor, "N 3"], *, forces_from: str
) -> Float[Tensor, "N 3"]:
    """Return dE/dpositions of outputs that were computed from `positions`, itself differentiable.

    Parameters
    ----------
    forces_from : "gradient" where the outputs' forces are its negative already
    """
    if forces_from == "gradient":
        return -outputs["forces"]
    (gradient,) = torch.autograd.grad(outputs["energy"].sum(), positions, create_graph=True)
    return gradient
