"""From a configuration to the text set of a latents set and one pair of text encoders."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Final, cast

from sdxl_distill.builder.in_place import until_not_swept
from sdxl_distill.builder.launch import Launch, refuse_in_job_array
from sdxl_distill.builder.repair import repair_set
from sdxl_distill.builder.set_builder import BuiltSet, build_set
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import TextEncoders, text_geometry
from sdxl_distill.runtime.device import resolve_device
from sdxl_distill.sets.derived_shards import decide_identity, holds_same_keys, planned_after
from sdxl_distill.sets.legal_plan import require_legal_plan
from sdxl_distill.sets.preflight import require_complete
from sdxl_distill.sets.text_content import CaptionEncoder, TextContent, text_tensors
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import FINGERPRINT, encode_record, text_schema
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME, SetFolder
from sdxl_distill.shards.set_identity import SetIdentity, SetReference
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location

_ID_DIGITS: Final = 12

_log = logging.getLogger(__name__)


def build_text_set(
    config: BuilderConfig,
    latents: ShardSet,
    launch: Launch,
    *,
    repair: bool = False,
    encoders: ModelFolder | None = None,
) -> tuple[Location, BuiltSet]:
    """Build what is missing of the text set, next to any other workers.

    Args:
        config: the configuration; `text_source` names the encoders, `cache.output_dir` the parent.
        latents: the set whose captions are encoded.
        launch: this process among those started with it.
        repair: keep the good shards of a damaged set and build the others.
        encoders: the checkpoint that `text_source` names, if the caller has found it already.

    Returns:
        The folder of the set, and what was built.

    Raises:
        ConfigError, IncompatibleError: when the encoders are missing or of another kind.
        CorruptError, StorageError, NumericalError, Preempted: as `build_set`.
    """
    device = resolve_device(config.device, launch.world.local_rank)
    output_dir = Location(config.cache.output_dir)
    encoders = encoders or ModelFolder.resolve(config.text_source)

    # Rank 0 decides which set it is; the others are told.
    decide = partial(_prepare, config, encoders, latents, launch, output_dir, repair)
    identity = decide_identity(launch, "text", decide)
    location, shards = output_dir / identity.id, planned_after(latents, identity.id)
    # The encoders are loaded once, by the first shard or the empty record that is missing.
    loaded: list[CaptionEncoder] = []

    def encoder() -> CaptionEncoder:
        if not loaded:
            loaded.append(CaptionEncoder(TextEncoders.load(encoders, device)))
        return loaded[0]

    built = build_set(
        location,
        identity,
        shards,
        lambda: TextContent(latents, encoder()),
        partial(_describe, latents.manifest.catalog, encoder),
        launch.world,
        catalog=latents.manifest.catalog,
        exclusive=config.cache.exclusive,
    )
    if loaded:
        _report_cut_captions(loaded[0].num_truncated, identity)
    return location, built


def _prepare(
    config: BuilderConfig,
    encoders: ModelFolder,
    latents: ShardSet,
    launch: Launch,
    output_dir: Location,
    repair: bool,
) -> SetIdentity:
    """Do what rank 0 does alone: refuse what cannot be built, bring back good shards."""
    identity = text_identity(encoders, latents, output_dir)
    location, shards = output_dir / identity.id, planned_after(latents, identity.id)
    require_legal_plan(identity.id, identity.schema, shards)
    require_complete(location, identity, encoders.text_encoders)
    if repair:
        refuse_in_job_array(launch, str(location))
        accepts = partial(holds_same_keys, latents=latents)
        repair_set(location, identity, shards, accepts, exclusive=config.cache.exclusive)
    return identity


def _report_cut_captions(num_truncated: int, identity: SetIdentity) -> None:
    if num_truncated:
        _log.warning(
            "%d distinct captions are longer than %d tokens: the encoders do not see their ends",
            num_truncated,
            cast("int", identity.schema.tensors[0].shape[0]),
        )


def text_identity(encoders: ModelFolder, latents: ShardSet, output_dir: Location) -> SetIdentity:
    """Return the identity of the text set; its id is made from its fingerprint.

    Args:
        encoders: the checkpoint whose text encoders encode the captions.
        latents: the set whose captions are encoded.
        output_dir: the folder that holds one folder for each set.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when the encoders are missing or damaged.
    """
    geometry = text_geometry(encoders)
    identity = SetIdentity(
        kind="text",
        id="text",
        schema=text_schema(geometry.num_tokens, geometry.hidden_size, geometry.pooled_size),
        content={"text": encoders.text_fingerprint()},
        latents=SetReference(latents.manifest.identity.fingerprint),
    )
    identity = replace(identity, id=f"text-{identity.fingerprint[:_ID_DIGITS]}")
    reference = SetReference.between(
        latents.manifest.identity.fingerprint, output_dir / identity.id, latents.location
    )
    return replace(identity, latents=reference)


def _describe(
    catalog: int,
    encoder: Callable[[], CaptionEncoder],
    directory: Directory,
    identity: SetIdentity,
    indices: Iterable[ShardIndex],
) -> Manifest:
    if not directory.exists(EMPTY_RECORD_NAME):
        metadata = {FINGERPRINT: identity.fingerprint}
        content = encode_record(text_tensors(encoder()("")), metadata)
        until_not_swept(directory, partial(directory.publish_bytes, EMPTY_RECORD_NAME, content))
    digest = hashlib.sha256(SetFolder(directory).empty_record()).hexdigest()
    return Manifest.build(identity, catalog, indices, empty_sha256=digest)
