"""Angular functions of GemNet-OC and the learned maps from radial times angular bases to embeddings."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from molkd.pipeline.models.gemnet_oc.layers import he_orthogonal_
from molkd.pipeline.models.matmul import linear
from molkd.pipeline.models.ocp_blocks import GaussianBasis


def zonal_harmonics(cosine: Float[Tensor, "*shape"], n_spherical: int, dim: int) -> Tensor:
    """Stack Y_l0 = sqrt((2l+1)/4 pi) P_l(cosine) for l = 0 .. n_spherical-1 in a new axis `dim`."""
    polynomials = [torch.ones_like(cosine), cosine]
    for degree in range(1, n_spherical - 1):
        before, last = polynomials[-2:]
        polynomials.append(
            ((2 * degree + 1) / (degree + 1)) * cosine * last - (degree / (degree + 1)) * before
        )
    scaled = [
        p * math.sqrt((2 * degree + 1) / (4 * math.pi)) for degree, p in enumerate(polynomials[:n_spherical])
    ]
    return torch.stack(scaled, dim=dim)


class AngularBasis(nn.Module):
    """Holds the radial basis that goes with an angular one, under OCP's name."""

    def __init__(self, radial_basis: GaussianBasis) -> None:
        super().__init__()
        self.radial_basis = radial_basis


class BasisEmbedding(nn.Module):
    """Learned map W of a product basis, applied to its radial part only (GemNet's efficient bilinear layer).

    Parameters
    ----------
    n_radial : K
    n_embedding : I
    n_angular : A, number of angular functions
    """

    def __init__(self, n_radial: int, n_embedding: int, n_angular: int) -> None:
        super().__init__()
        self.n_embedding = n_embedding
        self.weight = nn.Parameter(torch.empty(n_radial, n_angular, n_embedding))
        he_orthogonal_(self.weight)

    def forward(self, rbf: Float[Tensor, "E K"]) -> Float[Tensor, "E I A"]:
        """Return what an edge's embedding makes of each angular function."""
        n_radial, n_angular, _ = self.weight.shape
        # OCP stores (K, A, I) and reads the product as (E, I, A), not transposed; trained weights know that.
        product = linear(rbf, self.weight.view(n_radial, -1).t())
        return product.view(-1, self.n_embedding, n_angular)


class RadialEmbedding(nn.Module):
    """The same without an angular part."""

    def __init__(self, n_radial: int, n_embedding: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_embedding, n_radial))
        he_orthogonal_(self.weight)

    def forward(self, rbf: Float[Tensor, "E K"]) -> Float[Tensor, "E I"]:
        """Map the radial functions."""
        return linear(rbf, self.weight)
