"""GemNet-OC (Gasteiger et al. 2022, arXiv:2204.02782), weight-compatible with OCP/fairchem v1."""
