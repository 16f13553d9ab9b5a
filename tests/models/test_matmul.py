"""Linear maps by oneDNN against PyTorch's own: values, first and second derivatives, any layout."""

import pytest
import torch
from torch.nn import functional

from molkd.pipeline.models import matmul

ROUNDING = 1e-5  # relative; float32 sums of up to 700 products in another order


def derivatives(linear, x, weight, bias):
    """Value, first derivatives and derivatives of a function of the first ones, as in a loss on forces."""
    value = linear(x, weight, bias)
    (slope,) = torch.autograd.grad(value.tanh().sum(), x, create_graph=True)
    loss = slope.square().sum()
    inputs = [x, weight] + ([bias] if bias is not None else [])
    return [value, slope, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("shape", [(700, 96), (300, 3, 64)], ids=["scalars", "vectors"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", ["whole", "transposed", "part"])
def test_agrees_with_torch_up_to_second_derivatives(shape, with_bias, layout):
    generator = torch.Generator().manual_seed(0)
    n_in, n_out = shape[-1], 128
    x = torch.randn(shape, generator=generator, requires_grad=True)
    stored = {"whole": (n_out, n_in), "transposed": (n_in, n_out), "part": (n_out, 2 * n_in)}[layout]
    stored = torch.randn(stored, generator=generator) / n_in**0.5
    weight = {"whole": stored, "transposed": stored.t(), "part": stored[:, :n_in]}[layout]
    weight = weight.detach().requires_grad_()
    bias = torch.randn(n_out, generator=generator, requires_grad=True) if with_bias else None
    assert x.numel() * n_out >= matmul._MIN_PRODUCTS  # otherwise both sides are the same function
    for value, expected in zip(
        derivatives(matmul.linear, x, weight, bias),
        derivatives(functional.linear, x, weight, bias),
        strict=True,
    ):
        scale = expected.detach().abs().max()
        torch.testing.assert_close(value, expected, atol=float(ROUNDING * scale), rtol=0)


def test_without_gradients_and_in_other_precisions():
    x, weight = torch.randn(700, 96), torch.randn(128, 96)
    with torch.no_grad():
        value = matmul.linear(x, weight)
    torch.testing.assert_close(value.double(), x.double() @ weight.double().t(), atol=1e-3, rtol=1e-4)
    exact = matmul.linear(x.double(), weight.double())
    assert torch.equal(exact, functional.linear(x.double(), weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear(x, weight).dtype == torch.bfloat16
