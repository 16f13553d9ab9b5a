"""Linear maps, on CPUs through oneDNN: PyTorch's own choice for float32 takes twice as long on some of them.

PyTorch gives float32 products to MKL, which uses half of what an AMD core can do; oneDNN, which PyTorch
carries too, is as fast as MKL elsewhere. Both round differently in the last place.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_MIN_PRODUCTS = 2**21  # below this many multiplications the detour costs more than it saves
_ONEDNN: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


class Linear(nn.Linear):
    """`torch.nn.Linear` by the faster library; same parameters."""

    def forward(self, x: Float[Tensor, "*rows A"]) -> Float[Tensor, "*rows B"]:
        """Map the last axis."""
        return linear(x, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*rows A"], weight: Float[Tensor, "B A"], bias: Float[Tensor, " B"] | None = None
) -> Float[Tensor, "*rows B"]:
    """Return x @ weight.T + bias, differentiable any number of times."""
    suits = (
        _ONEDNN is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _MIN_PRODUCTS
        and not torch.is_autocast_enabled("cpu")
    )
    if not suits:
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        mapped: Tensor = _OneDNNLinear.apply(x, weight, bias)
        return mapped
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = _ONEDNN(_dense(x), _dense(weight), bias, "none", [], "")
    return product


def _dense(matrix: Tensor) -> Tensor:
    """Copy what is no whole matrix, nor the transpose of one: oneDNN is a hundred times slower on such."""
    if matrix.is_contiguous() or (matrix.ndim == 2 and matrix.t().is_contiguous()):
        return matrix
    return matrix.contiguous()


class _OneDNNLinear(torch.autograd.Function):
    """The product with its derivative, which is made of such products again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (M, B)
        of_x = linear(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(dim=0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias
