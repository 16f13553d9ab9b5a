"""The shared cache format: what is stored, where, and how it is checked; needs no torch."""
