"""Finishing a set: when all shards are committed, one worker writes the manifest.

The manifest is a function of set identity, catalog and indices, so two finishers of a catalog
write the same bytes; the claim on it only saves reading every index twice. Only the manifest of a
later catalog replaces it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from sdxl_distill.builder.commit import REPAIR, naming_repair, shard_header
from sdxl_distill.builder.existing_manifest import ExistingManifest, parse_manifest
from sdxl_distill.builder.in_place import require_in_place, until_not_swept
from sdxl_distill.builder.plan import PlannedShard, SetBuild
from sdxl_distill.builder.withdrawal import discard_withdrawn
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.limits import MAX_MANIFEST_BYTES
from sdxl_distill.runtime.ordered_map import ordered_map
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location

FINISH = "finish"
_NUM_THREADS = 8

Describe = Callable[[Directory, SetIdentity, Iterable[ShardIndex]], Manifest]
"""Makes the manifest from the folder, its set identity and all indices in order."""

Sources = dict[ShardName, str | None]
"""The source of each shard, as `PlannedShard.source_sha256`."""


def finish_set(
    build: SetBuild, existing: ExistingManifest, catalog: int, describe: Describe
) -> Manifest:
    """Return the manifest of a set whose shards are all committed; write it if necessary.

    While another worker writes it, wait until that worker is done or dead.

    Args:
        build: this worker's part; its shards are all those of catalog `catalog`.
        existing: the manifest in the set's folder.
        catalog: the number of the catalog; a manifest of a greater one is left alone.
        describe: the function that makes the manifest.

    Raises:
        CorruptError: when an index or tar is missing, damaged, or belongs to another set.
        IncompatibleError: when a shard was made from a latents shard other than today's.
        StorageError, Preempted: as `build_shards`.
    """
    directory, identity, queue = build.directory, build.identity, build.queue
    planned = {shard.name: shard.source_sha256 for shard in build.shards}
    judged: Manifest | None = None
    while True:
        found = existing.read()
        # One that was judged already is not compared again each second: it may list 10⁵ shards.
        if found is not judged and found is not None and _holds(found, identity, catalog, planned):
            break
        judged = found
        build.stop.check(directory.where())
        require_in_place(directory)
        claim = queue.claim(FINISH)
        if claim is None:
            time.sleep(queue.timing.poll_seconds)
            continue
        manifest = describe(directory, identity, _indices(build))
        until_not_swept(directory, partial(_put, directory, manifest))
        queue.release(claim, committed=False)
    discard_withdrawn(Location(directory.where()), identity.id)
    queue.sweep()
    return found


def _put(directory: Directory, manifest: Manifest) -> None:
    """Write the manifest; what it replaced is put back when it is that of a later catalog.

    A finisher that slept until now may find the set grown and finished by another worker.
    """
    newest = manifest
    while True:
        content = directory.swap_bytes(MANIFEST_NAME, newest.to_bytes(), MAX_MANIFEST_BYTES)
        replaced = content and parse_manifest(content, directory.where(MANIFEST_NAME))
        if not replaced or not _is_later(replaced, newest):
            return
        newest = replaced


def _is_later(manifest: Manifest, other: Manifest) -> bool:
    """Whether a manifest holds all of another one and was made for more images or draws."""
    sizes = [(each.catalog, len(each.shards)) for each in (manifest, other)]
    return sizes[0] > sizes[1] and _holds(manifest, other.identity, other.catalog, _sources(other))


def _holds(manifest: Manifest, identity: SetIdentity, catalog: int, planned: Sources) -> bool:
    """Whether a manifest describes at least the planned shards, made from the same sources.

    A later catalog may have been finished with fewer draws: then its first draw counts.
    """
    if manifest.identity != identity or manifest.catalog < catalog:
        return False
    if manifest.catalog > catalog:
        planned = {name: source for name, source in planned.items() if name.draw == 0}
    return planned.items() <= _sources(manifest).items()


def _sources(manifest: Manifest) -> Sources:
    sources = (entry.source_sha256 for entry in manifest.shards)
    return dict(zip(manifest.names(), sources, strict=True))


def _indices(build: SetBuild) -> Iterator[ShardIndex]:
    """Yield the index of each shard; threads read ahead, since most of the time is disk latency."""
    check = partial(_index, build.folder, build.identity)
    for index in ordered_map(check, build.shards, _NUM_THREADS, "finish"):
        yield index
        build.queue.heartbeat.show_progress()


def _index(folder: SetFolder[Directory], identity: SetIdentity, shard: PlannedShard) -> ShardIndex:
    with naming_repair(folder.where(shard.name.idx)):
        return _checked_index(folder, identity, shard)


def _checked_index(
    folder: SetFolder[Directory], identity: SetIdentity, shard: PlannedShard
) -> ShardIndex:
    name, expected = shard.name, shard_header(identity, shard)
    try:
        index, num_bytes = folder.index(name), folder.tar(name).num_bytes
    except FileNotFoundError as error:
        raise CorruptError("the index or the tar of a committed shard is missing") from error
    if index.header.source_sha256 != expected.source_sha256:
        raise IncompatibleError(
            "the shard was planned for other images than those in today's catalog"
            if identity.kind == "latents"
            else "the shard was made from another latents shard than today's",
            where=folder.where(name.idx),
            action=REPAIR,
        )
    if index.header.content != expected.content or num_bytes != index.tar_bytes:
        raise CorruptError(
            f"the index belongs to another set, or to a tar of {index.tar_bytes} bytes",
            expected=f"an index of set {identity.id} and its tar of {num_bytes} bytes",
        )
    return index
