"""The compiled optimizer step: the same weights from a handful of graphs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo

from sdxl_distill.optimizer.adamw import AdamW

pytestmark = pytest.mark.processors

SHAPES = [(320,), (32, 4, 3, 3), (64, 32, 3, 3), (128, 256), (64, 64), (40, 320), (96, 128), (1,)]


def trained(*, compiled: bool) -> list[torch.nn.Parameter]:
    """Return weights after three steps in 8-bit states."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(torch.bfloat16))
        for shape in SHAPES
    ]
    optimizer = AdamW(weights, lr=1e-3, states="8bit", compiled=compiled)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step(torch.tensor(0.5))
    return weights


# torch's own compiler imports what its TorchScript warns of.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_compiled_step_moves_weights_alike_in_few_graphs(monkeypatch):
    # The same graphs without the code that a C++ compiler, which few machines have, makes of them.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = trained(compiled=True)
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for weight, expected in zip(compiled, trained(compiled=False), strict=True):
        # One step up or down of bfloat16's grid where the last bit of float32 decides.
        difference = (weight.float() - expected.float()).abs()
        assert (difference > 0).float().mean() < 0.01
        assert torch.all(difference <= 2**-7 * expected.float().abs().clamp(min=1e-6))
    assert num_graphs < len(SHAPES)
