"""The choice of device."""

from __future__ import annotations

import pytest
import torch

from sdxl_distill.device import resolve_device
from sdxl_distill.errors import ConfigError

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def test_cpu_is_the_cpu_for_every_process():
    assert resolve_device("cpu", 7) == torch.device("cpu")


@without_cuda
def test_auto_without_cuda_is_the_cpu():
    assert resolve_device("auto", 1) == torch.device("cpu")


@without_cuda
def test_cuda_on_a_machine_without_it_is_refused():
    with pytest.raises(ConfigError, match="no CUDA device on this machine"):
        resolve_device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_has_the_device_of_its_local_rank(device):
    last = torch.cuda.device_count() - 1
    assert resolve_device(device, last) == torch.device("cuda", last)


@pytest.mark.gpu
def test_more_processes_than_devices_are_refused():
    with pytest.raises(ConfigError, match="start fewer processes"):
        resolve_device("cuda", torch.cuda.device_count())
