"""Command lines that several tests use."""

from pathlib import Path

SMALL = ("--set", "model.hidden_channels=8", "--set", "model.num_layers=1", "--batch-size", "4")


def train(store: Path, out: Path, *arguments: object, student: str = "painn-tiny") -> tuple[object, ...]:
    """Return the command that trains a small student for two steps."""
    return ("train-student", store, "--student", student, "--out", out, *SMALL, "--steps", "2", *arguments)
