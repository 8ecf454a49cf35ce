"""Which device this process computes on."""

from __future__ import annotations

import torch

from sdxl_distill.errors import ConfigError


def resolve_device(device: str, local_rank: int) -> torch.device:
    """Turn the configured device into this process's own.

    Args:
        device: "auto" (CUDA when there is one, else the CPU), "cuda" or "cpu".
        local_rank: number of this process on its node; the number of its CUDA device.

    Raises:
        ConfigError: "cuda" on a machine without it, or more processes than CUDA devices.
    """
    num_devices = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and num_devices == 0):
        return torch.device("cpu")
    if num_devices == 0:
        raise ConfigError(
            '"cuda", but PyTorch finds no CUDA device on this machine',
            expected='"auto" or "cpu"',
            where="device",
            action="run with --set device=auto, or check the driver and that this PyTorch is "
            f"built for CUDA (it is {torch.__version__})",
        )
    if local_rank >= num_devices:
        raise ConfigError(
            f"local process {local_rank} has no device: this machine has {num_devices}",
            expected=f"at most {num_devices} processes on this machine",
            where="device",
            action="start fewer processes, or run with --set device=cpu",
        )
    return torch.device("cuda", local_rank)
