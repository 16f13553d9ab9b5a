"""What OCP's PaiNN and GemNet-OC share: element embedding, radial basis, activation, fitted scale factors."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from molkd.pipeline.models.blocks import GaussianSmearing

MAX_ATOMIC_NUMBER = 83  # rows of the embedding: H to Bi


def scaled_silu(x: Tensor, *, inplace: bool = False) -> Tensor:
    """SiLU with about unit variance for standard normal input."""
    return silu(x, inplace=inplace).mul_(1 / 0.6)


class ScaledSiLU(nn.Module):
    """SiLU with about unit variance for standard normal input."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return scaled_silu(x)


class AtomEmbedding(nn.Module):
    """One learned row per element, the first is hydrogen."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(MAX_ATOMIC_NUMBER, n_channels)
        nn.init.uniform_(self.embeddings.weight, -math.sqrt(3), math.sqrt(3))  # unit variance

    def forward(self, atomic_numbers: Int[Tensor, " N"]) -> Float[Tensor, "N C"]:
        """Look up the rows."""
        rows: Tensor = self.embeddings(atomic_numbers - 1)
        return rows


class GaussianBasis(nn.Module):
    """Gaussians of d/cutoff under an envelope that ends smoothly at the cutoff.

    Parameters
    ----------
    n_rbf : number of Gaussians K
    cutoff : Angstrom
    exponent : p of `envelope`
    exact_width : the Gaussians' width from their number; otherwise from their rounded centers
    """

    def __init__(self, n_rbf: int, cutoff: float, *, exponent: int = 5, exact_width: bool = False) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.exponent = exponent
        self.rbf = GaussianSmearing(1.0, n_rbf)
        if exact_width:  # the peer's GemNet-OC
            self.rbf.coefficient = -0.5 * (n_rbf - 1) ** 2

    def forward(self, distance: Float[Tensor, " E"]) -> Float[Tensor, "E K"]:
        """Expand distances in Angstrom."""
        u = distance * (1 / self.cutoff)
        gaussians: Tensor = self.rbf(u)
        return envelope(u, self.exponent).unsqueeze(1) * gaussians


def envelope(u: Float[Tensor, " E"], p: int) -> Float[Tensor, " E"]:
    """Fall from 1 at u = 0 to 0 at u = 1 with two smooth derivatives (Gasteiger et al. 2020, Eq. 8)."""
    a, b, c = -(p + 1) * (p + 2) / 2, p * (p + 2), -p * (p + 1) / 2
    value = 1 + u**p * (a + u * (b + u * c))
    return torch.where(u < 1, value, torch.zeros_like(u))


class ScaleFactor(nn.Module):
    """A fitted constant that brings its input to unit variance, or to the variance of `reference`.

    0 means not fitted, and then nothing is scaled; `molkd.pipeline.models.scaling` fits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    def forward(
        self,
        x: Float[Tensor, "*rows C"],
        reference: Tensor | None = None,  # noqa: ARG002  # seen by those who fit
    ) -> Float[Tensor, "*rows C"]:
        """Scale, without asking the device for the value."""
        factor = self.scale_factor
        return x * torch.where(factor == 0, torch.ones_like(factor), factor)


def scale_factors(model: nn.Module) -> dict[str, ScaleFactor]:
    """Return all scale factors of a model by the name of their layer, as OCP's scale files have it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ScaleFactor)}
