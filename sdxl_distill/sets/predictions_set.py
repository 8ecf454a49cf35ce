"""From a configuration to one teacher's predictions set: text first, then the UNet."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final, NamedTuple, cast

import torch

from sdxl_distill.builder.launch import Launch, refuse_in_job_array, require_one_worker
from sdxl_distill.builder.repair import num_existing_draws, repair_set
from sdxl_distill.builder.set_builder import BuiltSet, build_set
from sdxl_distill.builder.withdrawal import withdraw_for_rebuild
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.core.noise import NOISE_ALGORITHM
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.errors import ConfigError, IncompatibleError, StorageError
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import require_fit, text_geometry
from sdxl_distill.models.unet import compile_unet, load_unet, unet_geometry
from sdxl_distill.runtime.device import allow_tf32, resolve_device
from sdxl_distill.sets.derived_shards import decide_identity, holds_same_keys, planned_after
from sdxl_distill.sets.legal_plan import require_legal_plan
from sdxl_distill.sets.predictions_content import PredictionsContent, Teacher
from sdxl_distill.sets.preflight import require_complete, require_same_set
from sdxl_distill.sets.teacher_sources import TeacherSources
from sdxl_distill.sets.text_set import build_text_set, text_identity
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import STORED_DTYPES, predictions_schema
from sdxl_distill.shards.set_identity import NoiseRecipe, SetIdentity, SetReference
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location

_TORCH_DTYPES: Final = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}


class BuiltPredictions(NamedTuple):
    """The complete predictions set, and the text set that was needed for it."""

    predictions: BuiltSet
    text: BuiltSet
    text_location: Location


def build_predictions_set(
    config: BuilderConfig, launch: Launch, *, repair: bool = False
) -> BuiltPredictions:
    """Build what is missing of a teacher's predictions set, next to any other workers.

    Args:
        config: the builder's configuration.
        launch: this process among those started with it.
        repair: keep the good shards of a damaged set and build the others.

    Raises:
        ConfigError: when there is no latents set, or the teacher lacks a timestep.
        IncompatibleError: when teacher, text encoders and latents do not fit, or the folder
            belongs to another configuration.
        CorruptError, StorageError, NumericalError, Preempted: as `build_set`.
    """
    resolve_device(config.device, launch.world.local_rank)  # refuses a missing one before any work
    output_dir = Location(config.cache.output_dir)
    location = output_dir / config.teacher.teacher_id
    require_one_worker(launch.world, config.cache.exclusive, str(location))
    sources = TeacherSources.of(config)
    launch.decide("teacher", partial(check_teacher, config, sources))
    latents = _open_latents(config, launch)
    shards = planned_after(latents, config.teacher.teacher_id, config.cache.draws)

    # Rank 0 decides which set it is, and sets it aside or repairs it; the others are told.
    def decide() -> SetIdentity:
        text = text_identity(sources.text, latents, output_dir)
        identity = predictions_identity(config, sources.teacher, latents, text, output_dir)
        require_legal_plan(identity.id, identity.schema, shards)
        require_complete(location, identity, [sources.teacher.unet])
        if not config.cache.skip_existing:
            # After the checkpoints were checked: a broken one must not cost the existing set.
            withdraw_for_rebuild(launch, location)
        # Before the captions are encoded: that may take an hour.
        require_same_set(location, identity, repair=repair)
        if repair:
            refuse_in_job_array(launch, str(location))
            num_draws = max(config.cache.draws, num_existing_draws(location, identity.id))
            existing = planned_after(latents, identity.id, num_draws)
            accepts = partial(holds_same_keys, latents=latents)
            repair_set(location, identity, existing, accepts, exclusive=config.cache.exclusive)
        return identity

    identity = decide_identity(launch, "predictions", decide)
    text_location, built_text = build_text_set(
        config, latents, launch, repair=repair, encoders=sources.text
    )
    text = open_shard_set(text_location)
    built = build_set(
        location,
        identity,
        shards,
        partial(_content, config, sources.teacher, latents, text, identity, launch),
        partial(_describe, latents.manifest.catalog),
        launch.world,
        catalog=latents.manifest.catalog,
        exclusive=config.cache.exclusive,
    )
    return BuiltPredictions(built, built_text, text_location)


def check_teacher(config: BuilderConfig, sources: TeacherSources) -> None:
    """Check that teacher and text encoders fit each other, without reading any weights.

    Raises:
        ConfigError: when the range of timesteps goes beyond the teacher's.
        IncompatibleError: when the checkpoint is not SDXL's kind or the encoders do not fit.
    """
    teacher, text = sources
    require_fit(
        text_geometry(text), unet_geometry(teacher), f"{text.reference} next to {teacher.reference}"
    )
    num_steps = teacher.noise_schedule().num_train_timesteps
    if config.cache.max_timestep > num_steps:
        raise ConfigError(
            f"{config.cache.max_timestep}",
            expected=f"at most {num_steps}, the teacher's number of training timesteps",
            where="cache.max_timestep",
            action="lower it; it is exclusive",
        )


def predictions_identity(
    config: BuilderConfig,
    checkpoint: ModelFolder,
    latents: ShardSet,
    text: SetIdentity,
    output_dir: Location,
) -> SetIdentity:
    """Return the identity of the predictions set that a configuration describes.

    Args:
        config: the builder's configuration.
        checkpoint: the teacher.
        latents: the set that the teacher follows.
        text: the identity of the text set next to it, which need not be built yet.
        output_dir: the folder that holds one folder for each set.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when the teacher is missing, damaged or
            of another kind than the latents.
    """
    cache, teacher = config.cache, config.teacher
    geometry = unet_geometry(checkpoint)
    latents_identity, location = latents.manifest.identity, output_dir / teacher.teacher_id
    num_channels = cast("int", latents_identity.schema.tensors[0].shape[0])
    if num_channels != geometry.channels:
        raise IncompatibleError(
            f"latents of {num_channels} channels",
            expected=f"{geometry.channels}, as the UNet takes them",
            where=str(latents.location),
            action="use the teacher with latents from its own family's VAE",
        )
    # Text: copied into every record in layout `full`, a reference to its set in `compact`.
    num_tokens, hidden_size = cast("tuple[int, int]", text.schema.tensors[0].shape)
    schedule = checkpoint.noise_schedule(teacher.prediction_type, teacher.zero_terminal_snr)
    shared_text = None
    if cache.layout == "compact":
        shared_text = SetReference.between(text.fingerprint, location, output_dir / text.id)
    return SetIdentity(
        kind="predictions",
        id=teacher.teacher_id,
        schema=predictions_schema(
            cache.layout,
            STORED_DTYPES[cache.dtype],
            num_channels,
            num_tokens,
            hidden_size,
            geometry.pooled_size,
        ),
        content={
            "teacher": checkpoint.unet_fingerprint(),
            "text": text.content["text"],
            "use_bf16": teacher.use_bf16,
            "version": cache.version,
        },
        layout=cache.layout,
        noise=NoiseRecipe(NOISE_ALGORITHM, cache.base_seed, cache.min_timestep, cache.max_timestep),
        noise_schedule=schedule,
        latents=SetReference.between(latents_identity.fingerprint, location, latents.location),
        text=shared_text,
    )


def load_teacher(
    config: BuilderConfig,
    checkpoint: ModelFolder,
    noise_schedule: NoiseSchedule,
    device: torch.device,
) -> Teacher:
    """Load the UNet of a configuration.

    Args:
        config: the builder's configuration.
        checkpoint: the teacher.
        noise_schedule: the noise schedule of the predictions set.
        device: the device that it runs on.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `models.unet.load_unet`.
    """
    dtype = torch.bfloat16 if config.teacher.use_bf16 else torch.float32
    unet = load_unet(checkpoint, dtype, device)
    full_batch = None
    if config.cache.compile != "none":
        compile_unet(unet, config.cache.compile, len(config.buckets))
        full_batch = config.cache.batch_size
    stored_dtype = _TORCH_DTYPES[config.cache.dtype]
    return Teacher(unet, noise_schedule, device, stored_dtype, full_batch)


def open_latents(config: BuilderConfig) -> ShardSet:
    """Open the latents set that the configuration names.

    Raises:
        ConfigError: when there is none or it is not complete; names the command that builds it.
    """
    try:
        return open_shard_set(config.data.latent_cache.cache_dir)
    except ConfigError as error:
        raise ConfigError(
            error.found,
            where=error.where,
            expected="a complete latents set",
            action="build it first: accelerate launch tools/build_latents.py --config …",
        ) from error


def _open_latents(config: BuilderConfig, launch: Launch) -> ShardSet:
    """Open the latents set, in the same state on every rank."""
    latents = open_latents(config)
    digest = launch.decide("latents", lambda: latents.manifest.digest)
    if latents.manifest.digest != digest:
        raise StorageError(
            "the latents set grew while this launch was starting",
            where=str(latents.location),
            action="run again",
        )
    return latents


def _content(
    config: BuilderConfig,
    checkpoint: ModelFolder,
    latents: ShardSet,
    text: ShardSet,
    identity: SetIdentity,
    launch: Launch,
) -> PredictionsContent:
    device = resolve_device(config.device, launch.world.local_rank)
    allow_tf32(config.tf32)
    assert identity.noise_schedule is not None and identity.noise is not None
    teacher = load_teacher(config, checkpoint, identity.noise_schedule, device)
    return PredictionsContent(teacher, latents, text, identity.noise, config.cache.batch_size)


def _describe(
    catalog: int, _directory: Directory, identity: SetIdentity, indices: Iterable[ShardIndex]
) -> Manifest:
    return Manifest.build(identity, catalog, indices)
