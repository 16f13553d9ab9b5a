"""Ways out of the package: what other programs call."""
