"""Which device to run on, and what there is of it."""

import os

import torch

from molkd.pipeline.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the named device; ``auto`` takes CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # as any other kind that is not supported
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: no such device; take auto, cpu, cuda or cuda:1")
    n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    # torch keeps an index in one byte: 999 would come back as -25.
    if device.type == "cuda" and not 0 <= int(name.partition(":")[2] or 0) < n_devices:
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} sees {n_devices} CUDA devices; "
            "take cpu, or see kd doctor"
        )
    return device


def synchronize(device: torch.device) -> None:
    """Wait for what runs on the device; without it only the launch of kernels would be timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_cores() -> int:
    """Return how many cores this process may use, which a scheduler may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
