"""What a run or a report was made with: versions, and the machine's kind, never its name."""

import platform
from importlib.metadata import version

import torch

from molkd.pipeline.evaluation.throughput import device_name


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Return versions of molkd, torch and Python, the platform, and the device if one is given."""
    facts = {
        "molkd": version("molkd"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if device is not None:
        facts["device"] = device_name(device)
    return facts
