"""Checkpoints of OCP and fairchem v1 as teachers: PaiNN, SchNet and GemNet-OC of every age, read safely."""
