"""Inside: eV, Angstrom, eV/A. These factors convert at the boundary only."""

KCAL_PER_MOL = 0.0433641  # eV; the value that the schnetpack ethanol weights were published with
MILLI = 1e3  # eV -> meV, eV/A -> meV/A, in reports
