"""The schema of a builder's file: what `build_latents` and `build_shards` are told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from sdxl_distill.config.nested_folder import Key, require_beside_sets
from sdxl_distill.config.section import (
    BrokenRule,
    Compile,
    Count,
    Device,
    Place,
    PredictionType,
    Resolution,
    SafeName,
    Section,
    Seed,
    Side,
    StoredDtype,
)
from sdxl_distill.core.bucket import SDXL_BUCKETS, Bucket
from sdxl_distill.limits import (
    MAX_BUCKETS,
    MAX_DRAWS,
    MAX_RECORDS,
    MAX_SIDE_PX,
    MAX_TIMESTEPS,
    MAX_VERSION_LENGTH,
)

_SDXL_SIZE = 1024
_SIZE_STEP = 128  # SDXL's sides are multiples of 64; scaled by size / 1024 they must be of 8
_LONGEST_SIDE = max(max(bucket) for bucket in SDXL_BUCKETS)
_MAX_SCALED_SIZE = MAX_SIDE_PX * _SDXL_SIZE // _LONGEST_SIDE // _SIZE_STEP * _SIZE_STEP


def _check_teacher_id(teacher_id: str) -> str:
    if re.fullmatch(r"text-[0-9a-f]{12}", teacher_id):
        raise BrokenRule(
            f'"{teacher_id}" is the name of a text set', expected="a name of the teacher's own"
        )
    return teacher_id


TeacherId = Annotated[SafeName, AfterValidator(_check_teacher_id)]


class TeacherSection(Section):
    """The teacher whose predictions are cached."""

    checkpoint_path: Place
    """A local diffusers folder or a hub id."""
    teacher_id: TeacherId
    """Name of the teacher, and so of its predictions set, its shards and its loss in the logs."""
    use_bf16: bool = True
    """Run the UNet in bfloat16; false runs it in float32."""
    prediction_type: PredictionType | None = None
    """What the UNet predicts, if the checkpoint's scheduler states it wrongly or not at all."""
    zero_terminal_snr: bool | None = None
    """Whether its noise schedule ends in pure noise, if the checkpoint states it wrongly."""


class BucketSection(Section):
    """Which resolutions images are cropped to."""

    enabled: bool = True
    """Choose the bucket nearest in aspect ratio; false crops every image to one square."""
    resolutions: (
        Annotated[tuple[Resolution, ...], Field(strict=False, min_length=1, max_length=MAX_BUCKETS)]
        | None
    ) = None
    """Buckets as [width, height] in pixels; null takes SDXL's own 40, scaled to `data.size`."""

    @model_validator(mode="after")
    def _check_distinct(self) -> BucketSection:
        seen: set[tuple[int, int]] = set()
        for number, resolution in enumerate(self.resolutions or ()):
            if resolution in seen:
                raise BrokenRule(
                    f"{list(resolution)} is listed twice",
                    expected="every bucket once",
                    key=("resolutions", number),
                )
            seen.add(resolution)
        return self


class LatentCacheSection(Section):
    """The latents set: encoded once, read by every teacher."""

    enabled: bool = True
    """Always true: teachers and trainer read latents, never images."""
    cache_dir: Place = "./cache/latents"
    """Folder of the latents set and of its catalog."""
    batch_size: Count = 4
    """Images that the VAE encodes at once on one device."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype that the VAE computes in; fp16 is not offered, since SDXL's VAE overflows in it."""

    @model_validator(mode="after")
    def _check_enabled(self) -> LatentCacheSection:
        if not self.enabled:
            raise BrokenRule(
                "false: without latents there is nothing that teachers and trainer could read",
                expected="true",
                key=("enabled",),
                action="remove the key; to keep the latents elsewhere set cache_dir instead",
            )
        return self


class BuilderDataSection(Section):
    """The images, and the latents set made of them."""

    image_dir: Place
    """Folder that is searched for images and captions, with all its subfolders."""
    size: Side = 1024
    """Side in pixels of the square whose area every bucket roughly has."""
    bucket: BucketSection = BucketSection()
    latent_cache: LatentCacheSection = LatentCacheSection()
    records_per_shard: Annotated[int, Field(ge=1, le=MAX_RECORDS)] = 512
    """Most records in one shard: the unit of work, of retry and of streaming."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """What happens to an image that cannot be decoded: leave it out and list it, or stop."""
    on_changed_caption: Literal["error", "keep"] = "error"
    """What happens when the caption of a committed image has changed: stop, or keep the old one."""
    allow_empty_captions: bool = False
    """Build even when most of the new images have no caption; false stops before anything is
    written, since the cause is nearly always a caption file or key of another name."""
    max_image_pixels: Count = 128_000_000
    """Images with more pixels count as bad images: a small file can decode to a huge one."""

    @model_validator(mode="after")
    def _check_size(self) -> BuilderDataSection:
        scaled = self.bucket.enabled and self.bucket.resolutions is None
        if scaled and self.size % _SIZE_STEP:
            raise BrokenRule(
                f"SDXL's buckets cannot be scaled to {self.size}",
                expected=f"a multiple of {_SIZE_STEP}",
                key=("size",),
                action="choose such a size, list bucket.resolutions, or set bucket.enabled: false",
            )
        if scaled and self.size > _MAX_SCALED_SIZE:
            raise BrokenRule(
                f"{self.size}, which scales SDXL's longest bucket beyond {MAX_SIDE_PX} pixels",
                expected=f"at most {_MAX_SCALED_SIZE}",
                key=("size",),
            )
        return self


class CacheSection(Section):
    """The predictions set of the teacher."""

    output_dir: Place = "./cache/teacher_predictions"
    """Folder that holds one folder per teacher, and the text sets of the compact layout."""
    version: Annotated[str, Field(max_length=MAX_VERSION_LENGTH)] = "1"
    """Free text in the fingerprint: change it to keep two otherwise equal configurations apart."""
    dtype: StoredDtype = "fp16"
    """Dtype that predictions are stored in."""
    base_seed: Seed = 42
    """Seed of every timestep and all noise; must be equal for all teachers of one student."""
    min_timestep: Annotated[int, Field(ge=0)] = 0
    """Smallest timestep, included."""
    max_timestep: Annotated[int, Field(ge=1, le=MAX_TIMESTEPS)] = 1000
    """Largest timestep, excluded; at most the teacher's number of training timesteps."""
    skip_existing: bool = True
    """Keep committed shards and build the others; false sets the old set aside and starts over."""
    layout: Literal["full", "compact"] = "full"
    """Full: every record holds noise and text embeddings. Compact: they are shared or recomputed,
    a quarter of the size from the second teacher on."""
    draws: Annotated[int, Field(ge=1, le=MAX_DRAWS)] = 1
    """Number of (timestep, noise) pairs that are predicted for every image."""
    batch_size: Count = 8
    """Records that the UNet predicts at once on one device."""
    compile: Compile = "none"
    """Compile the UNet with torch.compile. regional: its repeated blocks, once for all buckets, in
    a minute or two. full: the whole network, once for each bucket, in a minute or two each."""
    exclusive: bool = False
    """Promise that only one process builds, for file systems without create-only names."""

    @model_validator(mode="after")
    def _check_timesteps(self) -> CacheSection:
        if self.min_timestep >= self.max_timestep:
            raise BrokenRule(
                f"{self.min_timestep}",
                expected=f"less than max_timestep, {self.max_timestep}, which is excluded",
                key=("min_timestep",),
            )
        return self


class ModelSection(Section):
    """Where the VAE and the text encoders come from, if not from the teacher."""

    id: Place | None = None
    """Checkpoint of the VAE; null takes `model.text_encoder_id`, else the teacher's."""
    text_encoder_id: Place | None = None
    """Checkpoint of both text encoders; null takes `model.id`, else the teacher's."""


class BuilderConfig(Section):
    """Configuration of `build_latents`, `build_shards` and `verify_shards --config`."""

    device: Device = "auto"
    """Where models run: auto is CUDA if available, else the CPU; cuda requires it."""
    tf32: bool = True
    """Let a GPU multiply float32 matrices with 10 bits of mantissa: several times faster, with a
    relative error of about 5e-4. No effect on bfloat16 weights or on CPUs."""
    teacher: TeacherSection
    data: BuilderDataSection
    cache: CacheSection = CacheSection()
    model: ModelSection = ModelSection()

    @model_validator(mode="after")
    def _check_folders(self) -> BuilderConfig:
        latents = self.data.latent_cache.cache_dir
        predictions = Path(self.cache.output_dir) / self.teacher.teacher_id
        images: dict[Key, str | Path] = {("data", "image_dir"): self.data.image_dir}
        require_beside_sets(
            {"the latents set": latents}, {("cache", "output_dir"): self.cache.output_dir, **images}
        )
        require_beside_sets(
            {"the predictions set": predictions},
            {("data", "latent_cache", "cache_dir"): latents, **images},
        )
        return self

    @property
    def vae_source(self) -> str:
        """Checkpoint that the VAE is loaded from."""
        return self.model.id or self.model.text_encoder_id or self.teacher.checkpoint_path

    @property
    def text_source(self) -> str:
        """Checkpoint that both text encoders and tokenizers are loaded from."""
        return self.model.text_encoder_id or self.model.id or self.teacher.checkpoint_path

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The resolutions that images are cropped to."""
        size, bucket = self.data.size, self.data.bucket
        if not bucket.enabled:
            return (Bucket(size, size),)
        if bucket.resolutions is not None:
            return tuple(Bucket(width, height) for width, height in bucket.resolutions)
        return tuple(
            Bucket(width * size // _SDXL_SIZE, height * size // _SDXL_SIZE)
            for width, height in SDXL_BUCKETS
        )
