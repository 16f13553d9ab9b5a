"""The neighbour rule and the one batch type."""
