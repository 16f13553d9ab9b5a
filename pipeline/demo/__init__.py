"""Real molecules and a trained teacher, bundled for `kd demo`."""
