"""The shared cache format: what is stored, where, and how it is checked. Needs numpy, zarr and the standard library."""
