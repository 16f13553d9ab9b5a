"""Which device to run on."""

import torch

from molkd.pipeline.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the named device; ``auto`` takes CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: no such device; take auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} sees no CUDA device; take cpu or see kd doctor"
        )
    return device
