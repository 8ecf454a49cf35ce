"""A latents set as versions wrote it whose shards named no source."""

from __future__ import annotations

from pathlib import Path

from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.shards.writer import ShardWriter
from sdxl_distill.storage.fsio import Directory


def without_sources(path: Path) -> Manifest:
    """Write every shard of a set again, with headers that name no source; return its manifest."""
    with open_shard_set(path) as shard_set, Directory(path) as directory:
        old, indices = shard_set.manifest, []
        for name in old.names():
            reader = shard_set.reader(name)
            header = RecordHeader.build(
                old.identity.schema, name.width, name.height, old.identity.fingerprint
            )
            with directory.stage() as staged:
                writer = ShardWriter(staged, name, header)
                for number in range(reader.index.num_records):
                    record = header.encode(reader.read_record(number))
                    sidecar = reader.read_sidecar(number)
                    writer.write(reader.index.key(number), record, sidecar)
                indices.append(_replace(directory, writer.close(), Path(staged.temporary_name)))
        manifest = Manifest.build(old.identity, old.catalog, indices, old.undecodable)
        directory.replace_bytes("manifest.json", manifest.to_bytes())
    return manifest


def _replace(directory: Directory, index: ShardIndex, staged: Path) -> ShardIndex:
    content = (directory.path / staged).read_bytes()
    directory.replace_bytes(index.name.tar, content)
    directory.replace_bytes(index.name.idx, index.to_bytes())
    return index
