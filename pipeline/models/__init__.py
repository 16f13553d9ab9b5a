"""SchNet and PaiNN, weight-compatible with OCP, behind one interface."""
