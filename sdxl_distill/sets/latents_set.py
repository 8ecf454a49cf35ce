"""From a configuration to the latents set: scan, catalog, VAE, shards, manifest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from sdxl_distill.builder.commit import publish_set_identity
from sdxl_distill.builder.launch import Launch, refuse_in_job_array, require_one_worker
from sdxl_distill.builder.repair import repair_set, restore_catalog
from sdxl_distill.builder.set_builder import BuiltSet, build_set
from sdxl_distill.builder.withdrawal import withdraw_for_rebuild
from sdxl_distill.builder.work_queue import Claim, WorkQueue
from sdxl_distill.catalog.catalog import CATALOG_FOLDER, Catalog
from sdxl_distill.catalog.growth import ScanReport, extend_catalog, require_captions
from sdxl_distill.catalog.image_folder import ImageFolder
from sdxl_distill.catalog.scan import Progress, Scan, scan_folder
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.vae import encode_images, latent_channels, load_vae
from sdxl_distill.runtime.device import allow_tf32, resolve_device
from sdxl_distill.sets.latents_catalog import latents_plan, load_bound_catalog
from sdxl_distill.sets.latents_content import (
    IMAGE_PIPELINE,
    ImageReader,
    LatentsContent,
    planned_shards,
)
from sdxl_distill.sets.legal_plan import (
    most_images,
    require_legal_config,
    require_legal_rows,
)
from sdxl_distill.sets.preflight import require_complete, require_same_set
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.latents_plan import LATENTS_ID, LatentsPlan
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import latents_schema
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.storage.fsio import TEMPORARY_PREFIX, Directory
from sdxl_distill.storage.location import Location

_COMPUTE_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MAX_DECODERS: Final = 8
_SCAN: Final = "scan"


class BuiltLatents(NamedTuple):
    """The complete set, and on rank 0 what the scan found."""

    built: BuiltSet
    report: ScanReport | None


class _Decision(NamedTuple):
    """What rank 0 decides for its launch: the set, its catalog's number, the folder's mounts."""

    identity: SetIdentity
    n: int
    mounts: tuple[str, ...]

    def to_json(self) -> list[Any]:
        return [self.identity.to_json(), self.n, list(self.mounts)]

    @classmethod
    def from_json(cls, value: list[Any]) -> _Decision:
        identity, n, mounts = value
        return cls(SetIdentity.from_json(identity, "launch"), n, tuple(mounts))


def build_latents_set(
    config: BuilderConfig,
    launch: Launch,
    *,
    rebuild: bool = False,
    repair: bool = False,
    rescan: bool = False,
    scan_progress: Progress | None = None,
) -> BuiltLatents:
    """Build what is missing of the latents set, next to any other workers.

    Args:
        config: the builder's configuration.
        launch: this process among those started with it.
        rebuild: set the present set aside and build it again.
        repair: keep the good shards of a damaged set and build the others.
        rescan: read every image again, known or not.
        scan_progress: the function that shows the progress of the scan, on rank 0.

    Raises:
        ConfigError: for a missing or empty image folder, or a missing VAE.
        IncompatibleError: for a VAE that is not SDXL's kind, a folder of another
            configuration, or changed captions.
        CorruptError, StorageError, NumericalError, Preempted: as `build_set`.
    """
    resolve_device(config.device, launch.world.local_rank)  # refuses a missing one before any work
    location = Location(config.data.latent_cache.cache_dir)
    require_one_worker(launch.world, config.cache.exclusive, str(location))
    source = ModelFolder.resolve(config.vae_source)
    images = ImageFolder(Path(config.data.image_dir))  # as it is before the scan
    report: list[ScanReport] = []

    # Rank 0 scans, and decides which images are in which shard; the others are told.
    def decide() -> _Decision:
        identity, catalog, found = _prepare(
            config, source, launch, location, rebuild, repair, rescan, scan_progress
        )
        report.append(found)
        return _Decision(identity, catalog.n, tuple(found.mounts))

    identity, n, mounts = launch.decide(
        "latents", decide, encode=_Decision.to_json, decode=_Decision.from_json
    )
    with (location / CATALOG_FOLDER).open() as directory:
        catalog = Catalog.load(directory, n)
    # Every worker builds by the same plan, whatever is added to the folder meanwhile.
    plan = latents_plan(location, identity, catalog)
    built = build_set(
        location,
        identity,
        planned_shards(plan),
        partial(_content, config, source, plan, launch, images, mounts),
        partial(_describe, plan, catalog.n),
        launch.world,
        catalog=catalog.n,
        exclusive=config.cache.exclusive,
    )
    return BuiltLatents(built, report[0] if report else None)


def latents_identity(config: BuilderConfig, source: ModelFolder) -> SetIdentity:
    """Return the identity of the latents set that a configuration describes.

    Args:
        config: the builder's configuration.
        source: the checkpoint whose VAE encodes the images.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when its VAE is missing, damaged or of
            another kind.
    """
    return SetIdentity(
        kind="latents",
        id=LATENTS_ID,
        schema=latents_schema(latent_channels(source)),
        content={
            "buckets": sorted(list(bucket) for bucket in config.buckets),
            "image_pipeline": IMAGE_PIPELINE,
            "records_per_shard": config.data.records_per_shard,
            "vae": source.vae_fingerprint(),
            "vae_dtype": config.data.latent_cache.dtype,
        },
    )


def _prepare(
    config: BuilderConfig,
    source: ModelFolder,
    launch: Launch,
    location: Location,
    rebuild: bool,
    repair: bool,
    rescan: bool,
    progress: Progress | None,
) -> tuple[SetIdentity, Catalog, ScanReport]:
    """Do what rank 0 does alone: check, set aside, scan, bring back good shards."""
    identity, seen = latents_identity(config, source), None
    require_legal_config(config, identity.schema)
    require_complete(location, identity, [source.vae])
    if rebuild:
        # Before the withdrawal: a wrong image folder must not cost the existing set.
        seen = _scan(config, Catalog(), rescan, progress)
        withdraw_for_rebuild(launch, location)
    if repair:
        refuse_in_job_array(launch, str(location))
        _repair(location, identity, config.cache.exclusive)
    catalog, report = _update_catalog(config, location, identity, rescan, seen, progress)
    return identity, catalog, report


def _repair(location: Location, identity: SetIdentity, exclusive: bool) -> None:
    """Keep the good shards among those that the existing catalog knows."""
    restore_catalog(location, exclusive=exclusive)
    plan = latents_plan(location, identity, load_bound_catalog(location, identity, repair=True))
    repair_set(location, identity, planned_shards(plan), plan.accepts, exclusive=exclusive)


def _update_catalog(
    config: BuilderConfig,
    location: Location,
    identity: SetIdentity,
    rescan: bool,
    seen: Scan | None,
    progress: Progress | None,
) -> tuple[Catalog, ScanReport]:
    """Add what is new in the image folder to the catalog, while no other launch does so."""
    # Another configuration must be refused before it adds to this one's catalog.
    require_same_set(location, identity)
    with (
        location.real().open(create=True, exclusive=config.cache.exclusive) as directory,
        WorkQueue(directory) as queue,
        directory.folder(CATALOG_FOLDER) as folder,
    ):
        # One launch scans at a time; the others wait for its claim.
        claim = _claim_scan(queue)
        _sweep_catalog(folder)

        def show(num_done: int, num_files: int) -> None:
            queue.heartbeat.show_progress()
            if progress is not None:
                progress(num_done, num_files)

        known = load_bound_catalog(location, identity)
        scan = seen or _scan(config, known, rescan, show)
        # A set begins only when there are images for it.
        publish_set_identity(SetFolder(directory), identity)
        catalog, report = extend_catalog(
            folder,
            scan,
            buckets=config.buckets,
            records_per_shard=config.data.records_per_shard,
            on_changed_caption=config.data.on_changed_caption,
            accept=partial(require_legal_rows, identity.schema, config.cache.draws),
        )
        queue.release(claim, committed=False)
        return catalog, report


def _scan(config: BuilderConfig, catalog: Catalog, rescan: bool, progress: Progress | None) -> Scan:
    scan = scan_folder(
        config.data.image_dir,
        catalog,
        max_pixels=config.data.max_image_pixels,
        max_images=most_images(config),
        on_bad_image=config.data.on_bad_image,
        rescan=rescan,
        progress=progress,
    )
    if not config.data.allow_empty_captions:
        require_captions(catalog, scan)
    return scan


def _claim_scan(queue: WorkQueue) -> Claim:
    while (claim := queue.claim(_SCAN)) is None:
        time.sleep(queue.timing.poll_seconds)
    return claim


def _sweep_catalog(folder: Directory) -> None:
    """Remove temporary files: the process that left one no longer holds the claim on the scan."""
    for name in folder.names():
        if name.startswith(TEMPORARY_PREFIX):
            folder.remove(name)


def _content(
    config: BuilderConfig,
    source: ModelFolder,
    plan: LatentsPlan,
    launch: Launch,
    images: ImageFolder,
    mounts: Sequence[str],
) -> LatentsContent:
    images.watch(mounts)
    settings = config.data.latent_cache
    device = resolve_device(config.device, launch.world.local_rank)
    allow_tf32(config.tf32)
    vae = load_vae(source, _COMPUTE_DTYPES[settings.dtype], device)
    return LatentsContent(
        plan,
        ImageReader(images, config.data.max_image_pixels, config.data.on_bad_image),
        partial(encode_images, vae),
        settings.batch_size,
        num_threads=min(launch.world.num_cores, _MAX_DECODERS),
    )


def _describe(
    plan: LatentsPlan,
    catalog: int,
    _directory: Directory,
    identity: SetIdentity,
    indices: Iterable[ShardIndex],
) -> Manifest:
    undecodable: list[str] = []

    def looked_at() -> Iterator[ShardIndex]:
        for index in indices:
            undecodable.extend(plan.missing(index))
            yield index

    # One index at a time: those of 10^7 images take gigabytes.
    return Manifest.build(identity, catalog, looked_at(), undecodable)
