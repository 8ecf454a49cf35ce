"""The choice of device."""

from __future__ import annotations

import pytest
import torch

from sdxl_distill.errors import ConfigError
from sdxl_distill.runtime.device import CopyStream, HostCopy, allow_tf32, resolve_device

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


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.ones(3)
    with CopyStream(torch.device("cpu")).copying() as copy:
        assert copy(tensor) is tensor
    assert HostCopy(tensor).result() is tensor


@pytest.mark.gpu
def test_copies_arrive_before_they_are_computed_with():
    device = torch.device("cuda", 0)
    copies = CopyStream(device)
    source = torch.arange(1 << 24, dtype=torch.float32).pin_memory()
    for number in range(8):
        with copies.copying() as copy:
            copied = copy((source + number).pin_memory())
        assert torch.equal(HostCopy(copied * 2).result(), (source + number) * 2)


@pytest.mark.gpu
def test_nobody_waits_for_a_copy_that_is_started():
    device = torch.device("cuda", 0)
    copies = CopyStream(device)
    source = torch.ones(1 << 20).pin_memory()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with copies.copying() as copy:
            started = HostCopy(copy(source) * 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(started.result()[0]) == 2


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_for_matrices_and_convolutions_alike(allowed):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(allowed)
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
        assert torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
