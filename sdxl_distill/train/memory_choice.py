"""What a run keeps besides the weights, as memory allows: exact masters, and the average's place.

The choice is made once, when the student is loaded, and is the same on all ranks. What cannot fit
is refused there, and not after hours with an allocator's traceback.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Final, Literal, cast

import torch
from accelerate import Accelerator
from torch import nn

from sdxl_distill.config.distill import DistillConfig, StudentSection, TrainingSection
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.errors import ConfigError
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import text_geometry
from sdxl_distill.models.unet import unet_geometry
from sdxl_distill.runtime.free_memory import free_memory
from sdxl_distill.runtime.world import World
from sdxl_distill.stream.loader import JoinedStream
from sdxl_distill.train.trainer import make_optimizer
from sdxl_distill.train.trial_step import backward_bytes, batch_of_zeros, step_of

Place = Literal["device", "main memory"]

_FLOAT32_BYTES: Final = 4
_SPARE: Final = 0.04
"""Share of a device that is left free: temporaries of the update, and what the allocator loses."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a process of a run takes besides the student's weights.

    Attributes:
        step: gradients, and on a GPU activations, at the largest resolution.
        optimizer: the optimizer's states.
        masters: what exact masters add; 0 where weights are float32 already.
        average: this process's share of the average; 0 when it is off.
    """

    step: int
    optimizer: int
    masters: int
    average: int


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that a process may still take: on its device, and of main memory.

    Attributes:
        device: bytes of the device; on a CPU the same memory as `main`.
        main: this process's share of main memory.
    """

    device: int
    main: int


@dataclass(frozen=True)
class MemoryChoice:
    """What was chosen.

    Attributes:
        exact_masters: whether exact masters are kept.
        average: the place of the average.
    """

    exact_masters: bool
    average: Place


def settle_memory(
    config: DistillConfig,
    student: nn.Module,
    model_folder: ModelFolder,
    stream: JoinedStream,
    accelerator: Accelerator,
    saved_masters: bool | None,
) -> DistillConfig:
    """Return the configuration with what `auto` left open decided, alike on all ranks.

    Args:
        config: the run's configuration.
        student: the student, on its device and not yet wrapped.
        model_folder: the student's checkpoint.
        stream: the joined sets, which say the largest resolution.
        accelerator: the ranks.
        saved_masters: whether the checkpoint that is resumed has exact masters; None without one.

    Raises:
        ConfigError: on every rank, when nothing that the configuration allows fits.
    """
    # All ranks take the worst of their numbers, so that they choose alike.
    needs, free = _on_all_ranks(
        _needs(config, student, model_folder, stream, accelerator), _free(accelerator), accelerator
    )
    # What the configuration leaves open, the preferred first.
    settings = config.training
    asked = settings.exact_masters
    masters = [True, False] if asked == "auto" else [asked]
    if asked == "auto" and saved_masters is not None:
        masters = [saved_masters]
    if not config.student.use_bf16:
        masters = [False]
    places: list[Place] = ["device", "main memory"]
    if accelerator.device.type == "cpu" or not needs.average:
        places = ["device"]
    elif config.student.ema_device == "cpu":
        places = ["main memory"]
    choice = choose(needs, free, masters, places)
    if accelerator.is_main_process:
        _log.info(
            "memory: %s of %s free on the device; exact masters %s, average %s",
            _gigabytes(_device_bytes(needs, choice)),
            _gigabytes(free.device),
            "on" if choice.exact_masters else "off",
            f"in {choice.average}" if choice.average == "main memory" else "beside the student",
        )
    ema_device = "cpu" if choice.average == "main memory" else "auto"
    student_section = config.student.model_copy(update={"ema_device": ema_device})
    training = settings.model_copy(update={"exact_masters": choice.exact_masters})
    return config.model_copy(update={"student": student_section, "training": training})


def choose(
    needs: MemoryNeeds, free: FreeMemory, masters: list[bool], places: list[Place]
) -> MemoryChoice:
    """Return the best choice that fits: masters before none, and an average on the device.

    Args:
        needs: what a process needs.
        free: what it may take.
        masters: allowed values of `exact_masters`, the preferred one first.
        places: allowed places of the average, the preferred one first.

    Raises:
        ConfigError: when none of them fits; names the keys that make it smaller.
    """
    choices = [MemoryChoice(exact, place) for exact in masters for place in places]
    for choice in choices:
        average = needs.average if choice.average == "main memory" else 0
        if _device_bytes(needs, choice) <= free.device * (1 - _SPARE) and average <= free.main:
            return choice
    least = min(choices, key=lambda choice: _device_bytes(needs, choice))
    parts = [f"gradients and activations {_gigabytes(needs.step)}"]
    parts.append(f"optimizer {_gigabytes(needs.optimizer)}")
    if least.exact_masters:
        parts.append(f"exact masters {_gigabytes(needs.masters)}")
    if needs.average:
        parts.append(f"average {_gigabytes(needs.average)} {_where(least.average)}")
    raise ConfigError(
        f"besides the student's weights a step takes {', '.join(parts)}",
        expected=f"at most {_gigabytes(free.device * (1 - _SPARE))} on the device"
        + (f" and {_gigabytes(free.main)} of main memory" if len(places) > 1 else ""),
        where="memory of one process",
        action=_ADVICE,
    )


_ADVICE: Final = (
    "set student.use_gradient_checkpointing: true, training.optimizer: adamw_8bit, "
    "training.exact_masters: false or student.ema_device: cpu, whichever is not set, or halve "
    "training.batch_size and double training.gradient_accumulation_steps"
)


def optimizer_bytes(
    settings: TrainingSection, student: nn.Module, device_type: str
) -> tuple[int, int]:
    """Return the bytes of an optimizer's states and those of its exact masters."""
    weights = [
        (name, nn.Parameter(torch.empty_like(weight, device="meta")))
        for name, weight in student.named_parameters()
    ]
    exact = settings.model_copy(
        update={"exact_masters": all(weight.dtype == torch.bfloat16 for _, weight in weights)}
    )
    tensors = make_optimizer(exact, weights, device_type).state_tensors()
    masters = sum(each.nbytes for name, each in tensors.items() if name.endswith("/remainder"))
    return sum(each.nbytes for each in tensors.values()) - masters, masters


def average_bytes(settings: StudentSection, student: nn.Module, num_processes: int) -> int:
    """Return the bytes of one process's share of the average; 0 when it is off."""
    num_weights = sum(weight.numel() for weight in student.parameters())
    return _FLOAT32_BYTES * math.ceil(num_weights / num_processes) if settings.use_ema else 0


def _needs(
    config: DistillConfig,
    student: nn.Module,
    model_folder: ModelFolder,
    stream: JoinedStream,
    accelerator: Accelerator,
) -> MemoryNeeds:
    device = accelerator.device
    states, masters = optimizer_bytes(config.training, student, device.type)
    # Activations on a CPU are small beside the rest; a pass takes minutes there.
    step = sum(weight.nbytes for weight in student.parameters())
    if device.type == "cuda":
        step = _measured_step(config, student, model_folder, stream, device)
    average = average_bytes(config.student, student, accelerator.num_processes)
    return MemoryNeeds(step, states, masters, average)


def _measured_step(
    config: DistillConfig,
    student: nn.Module,
    model_folder: ModelFolder,
    stream: JoinedStream,
    device: torch.device,
) -> int:
    """Try a step at the largest resolution; where not even that fits, more than any device has."""
    schedule: NoiseSchedule = model_folder.noise_schedule()
    num_tokens = text_geometry(ModelFolder.resolve(config.text_source)).num_tokens
    largest = max(stream.order.table.buckets, key=lambda side: side[0] * side[1])
    bucket = Bucket(*largest)
    num_records = config.training.batch_size
    batch = batch_of_zeros(config, unet_geometry(model_folder), bucket, num_tokens, num_records)
    try:
        return backward_bytes(step_of(config, student, schedule, device), batch)
    except torch.OutOfMemoryError:
        return torch.cuda.get_device_properties(device).total_memory


def _free(accelerator: Accelerator) -> FreeMemory:
    world = World.from_environment()
    main = free_memory()
    # Where the kernel does not say, nothing is refused.
    share = 1 << 62 if main is None else main // world.local_size
    if accelerator.device.type == "cpu":
        return FreeMemory(share, share)
    on_device, _ = torch.cuda.mem_get_info(accelerator.device)
    return FreeMemory(on_device, share)


def _on_all_ranks(
    needs: MemoryNeeds, free: FreeMemory, accelerator: Accelerator
) -> tuple[MemoryNeeds, FreeMemory]:
    """Return the largest needs and the least free memory of all ranks, on every rank."""
    own = [needs.step, needs.optimizer, needs.masters, needs.average, -free.device, -free.main]
    numbers = torch.tensor([own], dtype=torch.int64, device=accelerator.device)
    gathered = cast("torch.Tensor", accelerator.gather(numbers)).amax(dim=0).tolist()
    return MemoryNeeds(*gathered[:4]), FreeMemory(-gathered[4], -gathered[5])


def _device_bytes(needs: MemoryNeeds, choice: MemoryChoice) -> int:
    masters = needs.masters if choice.exact_masters else 0
    average = needs.average if choice.average == "device" else 0
    return needs.step + needs.optimizer + masters + average


def _where(place: Place) -> str:
    return "beside it" if place == "device" else "in main memory"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
