"""Inside: eV, Angstrom, eV/A. These factors convert at the boundary only."""

KCAL_PER_MOL = 0.04336410390059322  # eV, CODATA 2014 as in ASE; 0.0433641 would be 0.4 meV off for ethanol
MILLI = 1e3  # eV -> meV, eV/A -> meV/A, in reports
