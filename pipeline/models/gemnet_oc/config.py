"""Hyper-parameters of GemNet-OC under OCP's names; the defaults are those of OCP's OC20 model."""

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from molkd.pipeline.config import Settings
from molkd.pipeline.graphs.neighbors import NeighborRule

# Within which OCP takes neighbors to be equally far if the limit is not strict: A^2 in the widest graph, A in
# those picked from it.
_TIE_TOLERANCE = 0.01


class Limits(NamedTuple):
    """How far and to how many neighbors a graph reaches."""

    cutoff: float  # A
    max_neighbors: int


class RadialBasisConfig(Settings):
    """Gaussians are the only radial basis."""

    name: Literal["gaussian"] = "gaussian"


class EnvelopeConfig(Settings):
    """Polynomial that ends the radial basis smoothly at the cutoff."""

    name: Literal["polynomial"] = "polynomial"
    exponent: int = Field(5, ge=1)


class CircularBasisConfig(Settings):
    """Basis of angles."""

    name: Literal["spherical_harmonics"] = "spherical_harmonics"


class SphericalBasisConfig(Settings):
    """Basis of pairs of an angle and a dihedral angle."""

    name: Literal["legendre_outer"] = "legendre_outer"


class GemNetOCConfig(Settings):
    """Sizes, cutoffs in Angstrom, numbers of nearest neighbors and which interactions are on."""

    name: Literal["gemnet_oc"] = "gemnet_oc"
    num_spherical: int = Field(7, ge=1)
    num_radial: int = Field(128, ge=2)
    num_blocks: int = Field(4, ge=1)
    emb_size_atom: int = Field(256, ge=1)
    emb_size_edge: int = Field(512, ge=1)
    emb_size_trip_in: int = Field(64, ge=1)
    emb_size_trip_out: int = Field(64, ge=1)
    emb_size_quad_in: int = Field(32, ge=1)
    emb_size_quad_out: int = Field(32, ge=1)
    emb_size_aint_in: int = Field(64, ge=1)
    emb_size_aint_out: int = Field(64, ge=1)
    emb_size_rbf: int = Field(16, ge=1)
    emb_size_cbf: int = Field(16, ge=1)
    emb_size_sbf: int = Field(32, ge=1)
    num_before_skip: int = Field(2, ge=0)
    num_after_skip: int = Field(2, ge=0)
    num_concat: int = Field(1, ge=0)
    num_atom: int = Field(3, ge=0)
    num_output_afteratom: int = Field(3, ge=0)
    num_atom_emb_layers: int = Field(0, ge=0)
    num_global_out_layers: int = Field(2, ge=0)
    cutoff: float = Field(12.0, gt=0)  # A, of the main graph
    cutoff_qint: float | None = Field(None, gt=0)  # None: as `cutoff`
    cutoff_aeaint: float | None = Field(None, gt=0)
    cutoff_aint: float | None = Field(None, gt=0)  # None: the largest of the others
    max_neighbors: int = Field(30, ge=1)
    max_neighbors_qint: int | None = Field(None, ge=1)  # None: as `max_neighbors`
    max_neighbors_aeaint: int | None = Field(None, ge=1)
    max_neighbors_aint: int | None = Field(None, ge=1)  # None: the largest of the others
    enforce_max_neighbors_strictly: bool = True
    rbf: RadialBasisConfig = RadialBasisConfig()
    envelope: EnvelopeConfig = EnvelopeConfig()
    cbf: CircularBasisConfig = CircularBasisConfig()
    sbf: SphericalBasisConfig = SphericalBasisConfig()
    extensive: bool = True  # energy: sum over the atoms; otherwise their mean
    output_init: Literal["HeOrthogonal", "zeros"] = "HeOrthogonal"
    activation: Literal["silu", "swish"] = "silu"
    regress_forces: bool = True
    direct_forces: bool = True  # False: minus the gradient of the energy
    forces_coupled: bool = False  # both directions of an edge exert the same force
    quad_interaction: bool = True
    atom_edge_interaction: bool = True
    edge_atom_interaction: bool = True
    atom_interaction: bool = True
    qint_tags: tuple[int, ...] = (0, 1, 2)  # a quadruplet's central edge touches an atom with such a tag
    use_pbc: bool = True

    @model_validator(mode="after")
    def _check(self) -> "GemNetOCConfig":
        for suffix, limits in (
            ("", self.main_limits),
            ("_aeaint", self.atom_edge_limits),
            ("_qint", self.quad_limits),
        ):
            for setting, value, widest in zip(Limits._fields, limits, self.widest_limits, strict=True):
                if value > widest:
                    raise ValueError(
                        f"{setting}{suffix} = {value:g} is larger than {self._widest_name(setting)} = "
                        f"{widest:g}, the widest graph's"
                    )
        return self

    def _widest_name(self, setting: str) -> str:
        return f"{setting}_aint" if self.atom_interaction else setting

    @property
    def main_limits(self) -> Limits:
        """Of the graph whose edges have features, before it is made symmetric."""
        return Limits(self.cutoff, self.max_neighbors)

    @property
    def atom_edge_limits(self) -> Limits:
        """Of the graph between atoms and edges; the main graph's where no interaction uses it, as in OCP."""
        return self._limits(
            self.cutoff_aeaint,
            self.max_neighbors_aeaint,
            used=self.atom_edge_interaction or self.edge_atom_interaction,
        )

    @property
    def quad_limits(self) -> Limits:
        """Of the graph of the quadruplets' central edges."""
        return self._limits(self.cutoff_qint, self.max_neighbors_qint, used=self.quad_interaction)

    @property
    def widest_limits(self) -> Limits:
        """Of the graph that all others are parts of."""
        if not (self.atom_edge_interaction or self.edge_atom_interaction or self.atom_interaction):
            return self.main_limits
        parts = (self.main_limits, self.atom_edge_limits, self.quad_limits)
        cutoff = max(limits.cutoff for limits in parts)
        max_neighbors = max(limits.max_neighbors for limits in parts)
        if not self.atom_interaction:
            return Limits(cutoff, max_neighbors)
        return Limits(self.cutoff_aint or cutoff, self.max_neighbors_aint or max_neighbors)

    def _limits(self, cutoff: float | None, max_neighbors: int | None, *, used: bool) -> Limits:
        if not used:
            return self.main_limits
        return Limits(cutoff or self.cutoff, max_neighbors or self.max_neighbors)

    @property
    def neighbor_rule(self) -> NeighborRule:
        """The widest graph; the others are parts of it."""
        return NeighborRule(*self.widest_limits, self.tie_tolerance, use_pbc=self.use_pbc)

    @property
    def edge_rule(self) -> NeighborRule:
        """The main graph, whose edges have features.

        Where ties are kept it is not exact: the model measures them by length, a rule by its square.
        """
        return NeighborRule(
            self.cutoff, self.max_neighbors, self.tie_tolerance, symmetrize=True, use_pbc=self.use_pbc
        )

    @property
    def tie_tolerance(self) -> float:
        """How far behind the first neighbor that is too many others stay."""
        return 0.0 if self.enforce_max_neighbors_strictly else _TIE_TOLERANCE
