"""How a teacher is asked: short batches are filled up where the UNet is compiled."""

from __future__ import annotations

import pytest
import torch

from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import compile_unet, load_unet, unet_geometry
from sdxl_distill.sets.predictions_content import Teacher, TeacherInput

pytestmark = pytest.mark.processors

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tiny_family) -> ModelFolder:
    return ModelFolder.resolve(str(tiny_family.teachers[0]))


def question(checkpoint: ModelFolder, num_records: int) -> TeacherInput:
    channels, hidden_size, pooled_size = unet_geometry(checkpoint)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(num_records, *shape, generator=generator).to(torch.float16)

    return TeacherInput(
        keys=[f"key {number}" for number in range(num_records)],
        seeds=torch.arange(num_records),
        timesteps=torch.arange(num_records) * 100,
        noise=draw(channels, 8, 8),
        latents=draw(channels, 8, 8),
        time_ids=torch.full((num_records, 6), 64, dtype=torch.int32),
        encoder_hidden_states=draw(77, hidden_size),
        pooled_embeds=draw(pooled_size),
    )


def teacher(unet: torch.nn.Module, full_batch: int | None = None) -> Teacher:
    return Teacher(unet, NoiseSchedule(), CPU, torch.float32, full_batch)


@pytest.mark.parametrize("num_records", [1, 3, 4])
def test_the_unet_always_gets_full_batches_and_the_answer_is_as_long_as_the_question(
    checkpoint, num_records
):
    unet = load_unet(checkpoint, torch.float32, CPU)
    sizes: list[int] = []
    unet.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    asked = question(checkpoint, num_records)
    answer = teacher(unet, full_batch=4).predict(asked)
    expected = teacher(unet).predict(asked)
    assert sizes == [4, num_records]
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)


def test_the_noise_is_added_as_the_schedule_says(checkpoint):
    seen: list[torch.Tensor] = []
    unet = load_unet(checkpoint, torch.float32, CPU)
    unet.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    asked = question(checkpoint, 3)
    teacher(unet).predict(asked)
    alphas = torch.from_numpy(NoiseSchedule().alphas_cumprod())[asked.timesteps].view(-1, 1, 1, 1)
    expected = alphas.sqrt() * asked.latents.double() + (1 - alphas).sqrt() * asked.noise.double()
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-5, atol=1e-6)


# torch's own compiler imports what its TorchScript warns of.
@pytest.mark.filterwarnings("default:.*torch.jit.script_method:DeprecationWarning")
def test_a_compiled_unet_may_have_a_shape_for_every_bucket(checkpoint):
    unet = load_unet(checkpoint, torch.float32, CPU)
    before = torch._dynamo.config.recompile_limit
    try:
        compile_unet(unet, "full", num_shapes=40)
        assert torch._dynamo.config.recompile_limit >= 40
        with torch.compiler.set_stance("force_eager"):
            assert teacher(unet, 4).predict(question(checkpoint, 2)).shape[0] == 2
    finally:
        torch._dynamo.config.recompile_limit = before
