"""Which device this process computes on, and how tensors get there.

On a GPU nothing here waits for it: copies run alongside the computation, in page-locked memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sdxl_distill.errors import ConfigError


def resolve_device(device: str, local_rank: int) -> torch.device:
    """Turn the configured device into this process's own, and make it the current one.

    Args:
        device: "auto" (CUDA if there is a GPU, else the CPU), "cuda" or "cpu".
        local_rank: this process's number on its node, and so the number of its CUDA device.

    Raises:
        ConfigError: "cuda" on a machine without it, or more processes than CUDA devices.
    """
    num_devices = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and num_devices == 0):
        return torch.device("cpu")
    # A GPU for each process of this machine, or an error.
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
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def allow_tf32(allowed: bool) -> None:
    """Decide, for the whole process, whether a GPU multiplies float32 matrices in TF32.

    TF32 keeps 10 of 23 bits of each factor's mantissa, a relative error of about 5e-4, and is
    several times faster. It does not affect bfloat16 weights or CPUs.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class CopyStream:
    """Copies tensors to a device while it computes something else.

    Args:
        device: the destination. On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def copying(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Yield a function that starts the copy of a tensor and returns the copy.

        After the block the device's computation waits for the copies; this process does not.
        """
        if self._stream is None:
            yield lambda tensor: tensor.to(self._device)
            return
        side, computing = self._stream, torch.cuda.current_stream(self._device)

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            with torch.cuda.stream(side):
                copied = tensor.to(self._device, non_blocking=True)
            # Its memory was taken on one stream and is read on another: neither may reuse it
            # before the other is done.
            copied.record_stream(computing)
            return copied

        yield copy
        computing.wait_stream(side)


class HostCopy:
    """A tensor on its way from a device to main memory.

    Args:
        tensor: the tensor to copy; one on a CPU is used as it is.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor = copy.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))
        else:
            self._tensor = tensor

    def result(self) -> torch.Tensor:
        """Wait for the copy and return it; any thread may call this."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor
