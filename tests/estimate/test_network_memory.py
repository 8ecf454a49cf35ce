"""Counting without storage what the allocator counts with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sdxl_distill.estimate.network_memory import (
    counted_memory,
    num_parameters,
    prediction_memory,
    weightless,
)
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import UnetInput, load_unet, predict, unet_geometry

SIZES = [(4, (256, 128)), (3, (256, 192))]


@pytest.fixture(scope="module")
def checkpoint(tiny_family) -> ModelFolder:
    return ModelFolder.resolve(str(tiny_family.base))


def allocated_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """Return the most that torch's CPU allocator held during work, and what it holds after."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.nbytes())
    live = peak = 0
    for _, num_bytes in changes:
        live += num_bytes
        peak = max(peak, live)
    return peak, live


def ask(unet, asked: UnetInput) -> torch.Tensor:
    return predict(unet, asked.latents.to(torch.float32), *asked[1:])


@pytest.mark.parametrize(("num_records", "size_px"), SIZES)
def test_a_prediction_takes_what_the_allocator_gives_out(checkpoint, num_records, size_px):
    unet = load_unet(checkpoint, torch.float32, "cpu")

    @torch.no_grad()
    def work() -> None:
        ask(unet, UnetInput.zeros(unet_geometry(checkpoint), num_records, size_px, 77))

    peak, _ = allocated_bytes(work)
    counted = prediction_memory(checkpoint, torch.float32, num_records, size_px, 77)
    assert counted.weights_bytes == sum(weight.nbytes for weight in unet.parameters())
    # Kernels take some workspace of their own.
    assert counted.activations_bytes <= peak <= 1.05 * counted.activations_bytes


@pytest.mark.parametrize("use_checkpointing", [False, True])
def test_a_backward_pass_takes_what_the_allocator_gives_out(checkpoint, use_checkpointing):
    geometry = unet_geometry(checkpoint)

    def prepared(unet):
        if use_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet.requires_grad_(True).train()

    def work(unet) -> None:
        asked = UnetInput.zeros(geometry, 3, (256, 192), 77)
        ask(unet, asked).square().mean().backward()

    unet = prepared(load_unet(checkpoint, torch.float32, "cpu"))
    peak, live = allocated_bytes(lambda: work(unet))
    with counted_memory() as count:
        unet = prepared(weightless(checkpoint.unet, torch.float32))
        before = count.live_bytes
        work(unet)
        counted_live = count.live_bytes - before
        counted_peak = count.peak_bytes - before
    assert counted_live == live == before  # gradients, as large as the weights
    assert counted_peak <= peak <= 1.05 * counted_peak


def test_a_storage_counts_once_and_until_its_last_view_is_gone():
    with counted_memory() as count:
        tensor = torch.zeros(100, dtype=torch.float32)
        row = tensor.view(10, 10)[3]
        assert count.live_bytes == 400
        del tensor
        assert count.live_bytes == 400
        del row
        assert (count.live_bytes, count.peak_bytes) == (0, 400)


def test_what_is_only_a_shape_takes_nothing():
    with counted_memory() as count:
        torch.zeros(100, device="meta")
        assert count.peak_bytes == 0


def test_parameters_are_counted_without_loading_them(checkpoint):
    loaded = load_unet(checkpoint, torch.bfloat16, "cpu")
    assert num_parameters(checkpoint.unet) == sum(weight.numel() for weight in loaded.parameters())


def test_half_the_bytes_per_weight_is_half_the_memory(checkpoint):
    full, half = (
        prediction_memory(checkpoint, dtype, 2, (128, 128), 77).weights_bytes
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert full == 2 * half


@pytest.mark.slow
def test_sdxl_predicts_in_12_gigabytes():
    sdxl = ModelFolder.resolve(str(Path(__file__).parents[2] / "benchmarks/sdxl_base"))
    memory = prediction_memory(sdxl, torch.bfloat16, 4, (1024, 1024), 77)
    assert memory.weights_bytes == 2 * 2_567_463_684
    assert memory.peak_bytes < 12e9
