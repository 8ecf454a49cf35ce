"""A student compiled block by block: few graphs for any number of buckets, the same names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch._dynamo

from sdxl_distill.demo.family import Family
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import (
    UnetInput,
    compile_unet,
    load_unet,
    predict,
    unet_geometry,
)

# torch's own compiler imports what its TorchScript warns of, and looks at every tensor's `.grad`.
pytestmark = [
    pytest.mark.processors,
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

NUM_KINDS = 8  # shapes of weights among the blocks of the tiny UNet


@pytest.fixture
def uncoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile to the same graphs without the code that a C++ compiler makes of them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield


@pytest.mark.usefixtures("uncoded")
def test_graphs_do_not_grow_with_the_number_of_buckets(tiny_family: Family) -> None:
    checkpoint = ModelFolder.resolve(str(tiny_family.base))
    plain = load_unet(checkpoint, torch.float32, "cpu").train()
    student = load_unet(checkpoint, torch.float32, "cpu").train()
    student.enable_gradient_checkpointing()
    for unet in (plain, student):
        unet.requires_grad_(True)
    compile_unet(student, "regional", 40)

    def num_graphs_after(num_records: int, size_px: tuple[int, int]) -> int:
        zeros = UnetInput.zeros(unet_geometry(checkpoint), num_records, size_px, 77)
        generator = torch.Generator().manual_seed(num_records)
        asked = zeros._replace(latents=torch.randn(zeros.latents.shape, generator=generator))
        predictions = [predict(unet, *asked) for unet in (student, plain)]
        torch.testing.assert_close(*predictions, rtol=1e-5, atol=1e-6)
        predictions[0].square().mean().backward()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    # A square, one that is not, and a single record, which dynamo takes for another shape.
    first = [num_graphs_after(2, (64, 64)), num_graphs_after(2, (96, 64))]
    bound = num_graphs_after(1, (64, 64))
    sizes = [(64, 96), (128, 64), (64, 128), (128, 96), (160, 64), (128, 128), (96, 160), (192, 64)]
    counts = [num_graphs_after(n, size) for n, size in zip((2, 3, 4, 2) * 2, sizes, strict=True)]

    assert first[0] <= NUM_KINDS + 2
    assert bound <= 3 * NUM_KINDS
    assert counts == [bound] * len(sizes)
    assert student.state_dict().keys() == plain.state_dict().keys()
