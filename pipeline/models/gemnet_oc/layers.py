"""Dense and residual layers of GemNet, their initial weights, and the embedding of edges."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from molkd.pipeline.models import matmul
from molkd.pipeline.models.ocp_blocks import scaled_silu

_INV_SQRT_2 = 1 / math.sqrt(2)


def activated(x: Tensor) -> Tensor:
    """Apply the scaled SiLU; overwrites `x` where no gradient is recorded."""
    return scaled_silu(x, inplace=not (torch.is_grad_enabled() and x.requires_grad))


def he_orthogonal_(weight: Tensor) -> None:
    """Fill with orthogonal rows of zero mean and variance 1/fan_in (Gasteiger et al. 2021, GemNet)."""
    nn.init.orthogonal_(weight)
    is_basis = weight.ndim == 3
    fan_in = math.prod(weight.shape[:-1]) if is_basis else weight.shape[1]
    if fan_in == 1:
        return
    with torch.no_grad():
        variance, mean = torch.var_mean(weight, dim=(0, 1) if is_basis else 1, keepdim=True)
        weight.sub_(mean).div_(torch.sqrt(variance + 1e-6)).mul_(fan_in**-0.5)


class Linear(nn.Module):
    """Linear map without bias; the weight stands in `linear`, as OCP names it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = matmul.Linear(n_in, n_out, bias=False)
        he_orthogonal_(self.linear.weight)

    def forward(self, x: Float[Tensor, "*rows A"]) -> Float[Tensor, "*rows B"]:
        """Map the rows."""
        mapped: Tensor = self.linear(x)
        return mapped


class Dense(Linear):
    """Linear map without bias, then the scaled SiLU."""

    def forward(self, x: Float[Tensor, "*rows A"]) -> Float[Tensor, "*rows B"]:
        """Map the rows."""
        return activated(super().forward(x))


class ResidualLayer(nn.Module):
    """(x + two dense layers of x) / sqrt 2."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.dense_mlp = nn.Sequential(Dense(n_channels, n_channels), Dense(n_channels, n_channels))

    def forward(self, x: Float[Tensor, "M C"]) -> Float[Tensor, "M C"]:
        """Add what the layers find."""
        return skip(x, self.dense_mlp(x))


def residual_layers(n_layers: int, n_channels: int) -> list[ResidualLayer]:
    """Return several residual layers."""
    return [ResidualLayer(n_channels) for _ in range(n_layers)]


def skip(x: Float[Tensor, "M C"], change: Float[Tensor, "M C"]) -> Float[Tensor, "M C"]:
    """Return (x + change) / sqrt 2; overwrites `change` where no gradient is recorded."""
    if torch.is_grad_enabled() and (x.requires_grad or change.requires_grad):
        return (x + change).mul_(_INV_SQRT_2)
    return change.add_(x).mul_(_INV_SQRT_2)


def plus(total: Float[Tensor, "E C"], term: Float[Tensor, "E C"]) -> Float[Tensor, "E C"]:
    """Add a term; in place where no gradient is recorded."""
    return total + term if torch.is_grad_enabled() else total.add_(term)


class EdgeEmbedding(nn.Module):
    """Dense layer over [h of the sender, h of the receiver, features of the edge]."""

    def __init__(self, n_atom: int, n_edge: int, n_out: int) -> None:
        super().__init__()
        self.dense = Dense(2 * n_atom + n_edge, n_out)
        self.sizes = [n_atom, n_atom, n_edge]

    def forward(
        self,
        h: Float[Tensor, "N A"],
        features: Float[Tensor, "E D"],
        sender: Int[Tensor, " E"],
        receiver: Int[Tensor, " E"],
    ) -> Float[Tensor, "E C"]:
        """Map atoms before they are spread over edges: there are far fewer of them."""
        w_sender, w_receiver, w_edge = self.dense.linear.weight.split(self.sizes, dim=1)
        total = matmul.linear(features, w_edge)  # (E, C)
        for weight, index in ((w_sender, sender), (w_receiver, receiver)):
            spread = matmul.linear(h, weight).index_select(0, index)  # (E, C)
            total = plus(total, spread)
        return activated(total)
