"""Shard sets of random tensors at real sizes, written by the real writer: what is read and joined.

Sizes are SDXL's: a full record at 1024² is 580,632 bytes. Values are random; noise, seeds and
timesteps are those that follow from the image ids, since the join checks them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from measuring.sdxl import NUM_TOKENS

from sdxl_distill.core.bucket import Bucket
from sdxl_distill.core.image_id import image_id
from sdxl_distill.core.noise import NOISE_ALGORITHM, noise, noise_seed, timestep
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.record import (
    Layout,
    RecordHeader,
    RecordSchema,
    latents_schema,
    predictions_schema,
    text_schema,
)
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME
from sdxl_distill.shards.set_identity import (
    SET_IDENTITY_NAME,
    NoiseRecipe,
    SetIdentity,
    SetReference,
)
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.writer import ShardWriter
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location
from sdxl_distill.storage.staged_file import StagedFile

CHANNELS, HIDDEN_SIZE, POOLED_SIZE = 4, 2048, 1280
BASE_SEED, MAX_TIMESTEP = 42, 1000
SIDECAR = b'{"captions":["%s"]}' % (b"about seventy words of caption " * 14)
_TEXT_ENCODERS, _VAE = "1" * 64, "2" * 64
_NUMPY_DTYPES = {"F16": np.float16, "I32": np.int32, "I64": np.int64}

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class SetFolders:
    """Sets that were written.

    Attributes:
        latents: folder of the latents set.
        teachers: folders of the predictions sets.
        text: folder of the text set; None in layout `full`.
        num_records: of each set.
        side_px: of the one bucket.
    """

    latents: Path
    teachers: tuple[Path, ...]
    text: Path | None
    num_records: int
    side_px: int

    def sets(self, num_teachers: int) -> list[Path]:
        """Return the folders that a join of the first teachers reads."""
        text = [] if self.text is None else [self.text]
        return [self.latents, *text, *self.teachers[:num_teachers]]

    def tars(self, num_teachers: int) -> list[Path]:
        """Return the tars in these folders."""
        return [tar for folder in self.sets(num_teachers) for tar in sorted(folder.glob("*.tar"))]


def write_sets(
    root: Path,
    *,
    num_records: int,
    num_teachers: int,
    layout: Layout = "full",
    side_px: int = 1024,
    records_per_shard: int = 128,
    num_buckets: int = 1,
    hidden_size: int = HIDDEN_SIZE,
) -> SetFolders:
    """Write a latents set, teachers, and in layout `compact` the text set, into a new folder.

    Args:
        root: of the sets.
        num_records: of each set, in all buckets.
        num_teachers: predictions sets.
        layout: of these.
        side_px: of the first bucket; each further one is 8 pixels higher.
        records_per_shard: of each shard but the last of a bucket.
        num_buckets: that share the records evenly.
        hidden_size: of the text embeddings.
    """
    latents = _SetInProgress.create(
        SetIdentity("latents", "latents", latents_schema(CHANNELS), {"vae": _VAE}), root, None
    )
    followers = list(_followers(root, latents, num_teachers, layout, hidden_size))
    ids = sorted(image_id(str(number).encode()) for number in range(num_records))
    for number in range(num_buckets):
        bucket = Bucket(side_px, side_px + 8 * number)
        cuts = range(0, len(own := ids[number::num_buckets]), records_per_shard)
        for shard, start in enumerate(cuts):
            shard_ids = own[start : start + records_per_shard]
            records = [_image_tensors(record_id, bucket, hidden_size) for record_id in shard_ids]
            latents.write_shard(shard, bucket, shard_ids, records, None)
            for teacher in followers:
                source = latents.indices[-1].tar_sha256
                teacher.write_shard(shard, bucket, shard_ids, records, source)
    for each in (latents, *followers):
        each.finish()
    folders = [each.folder.path for each in followers]
    text = folders.pop(0) if layout == "compact" else None
    return SetFolders(latents.folder.path, tuple(folders), text, num_records, side_px)


def random_record(header: RecordHeader, number: int) -> Tensors:
    """Return one record of random values, the same for the same number."""
    tensors: Tensors = {}
    for place in header.places:
        values = _random(f"{place.name} {number}", place.shape)
        tensors[place.name] = values.astype(_NUMPY_DTYPES[place.dtype])
    return tensors


def forget_cached_pages(paths: list[Path]) -> None:
    """Drop files from the page cache, so that the next read comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _followers(
    root: Path, latents: _SetInProgress, num_teachers: int, layout: Layout, hidden_size: int
) -> Iterator[_SetInProgress]:
    content = {"text": _TEXT_ENCODERS}
    text = None
    if layout == "compact":
        schema = text_schema(NUM_TOKENS, hidden_size, POOLED_SIZE)
        text = _SetInProgress.create(
            SetIdentity("text", f"text-{_TEXT_ENCODERS[:12]}", schema, content), root, latents
        )
        yield text
    sizes = (CHANNELS, NUM_TOKENS, hidden_size, POOLED_SIZE)
    for number in range(num_teachers):
        set_id = f"teacher_{number}"
        identity = SetIdentity(
            kind="predictions",
            id=set_id,
            schema=predictions_schema(layout, "F16", *sizes),
            content={**content, "teacher": hashlib.sha256(set_id.encode()).hexdigest()},
            layout=layout,
            noise=NoiseRecipe(NOISE_ALGORITHM, BASE_SEED, 0, MAX_TIMESTEP),
            noise_schedule=NoiseSchedule(),
            text=None if text is None else text.reference(root / set_id),
        )
        yield _SetInProgress.create(identity, root, latents)


def _image_tensors(record_id: str, bucket: Bucket, hidden_size: int) -> Tensors:
    """Return what all sets share of an image, and the latents."""
    seed = noise_seed(record_id, BASE_SEED)
    width, height = bucket
    image = (CHANNELS, height // 8, width // 8)
    return {
        "latents": _random(f"latents {record_id}", image),
        "time_ids": np.array([height, width, 0, 0, height, width], np.int32),
        "noise": noise(seed, width, height),
        "seed": np.array([seed]),
        "timestep": np.array([timestep(record_id, BASE_SEED, 0, 0, MAX_TIMESTEP)]),
        "resolution": np.array([width, height], np.int32),
        "encoder_hidden_states": _random(f"text {record_id}", (NUM_TOKENS, hidden_size)),
        "pooled_embeds": _random(f"pooled {record_id}", (POOLED_SIZE,)),
    }


def _random(label: str, shape: tuple[int, ...]) -> np.ndarray:
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "big")
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.standard_normal(shape, np.float32).astype(np.float16)


@dataclass
class _SetInProgress:
    identity: SetIdentity
    folder: Directory
    indices: list[ShardIndex]

    @classmethod
    def create(
        cls, identity: SetIdentity, root: Path, latents: _SetInProgress | None
    ) -> _SetInProgress:
        path = root / identity.id
        if latents is not None:
            identity = replace(identity, latents=latents.reference(path))
        folder = Directory(path, create=True)
        folder.publish_bytes(SET_IDENTITY_NAME, identity.to_bytes())
        return cls(identity, folder, [])

    def reference(self, directory: Path) -> SetReference:
        return SetReference.between(
            self.identity.fingerprint, Location(directory), Location(self.folder.path)
        )

    def write_shard(
        self,
        number: int,
        bucket: Bucket,
        ids: list[str],
        records: list[Tensors],
        source: str | None,
    ) -> None:
        identity = self.identity
        name = ShardName(identity.id, *bucket, number)
        header = RecordHeader.build(identity.schema, *bucket, identity.fingerprint, source)
        with self.folder.stage() as staged:
            index = self._write_tar(staged, name, header, ids, records)
            self.folder.publish(staged, name.tar)
        self.folder.publish_bytes(name.idx, index.to_bytes())
        self.indices.append(index)

    def _write_tar(
        self,
        staged: StagedFile,
        name: ShardName,
        header: RecordHeader,
        ids: list[str],
        records: list[Tensors],
    ) -> ShardIndex:
        writer = ShardWriter(staged, name, header)
        sidecar = SIDECAR if self.identity.kind == "latents" else None
        for record_id, shared in zip(ids, records, strict=True):
            digest = tensor_digest(shared["noise"]) if header.recreates_noise else None
            content = header.encode(self._own_tensors(record_id, shared))
            writer.write(name.key(record_id), content, sidecar, digest)
        return writer.close()

    def _own_tensors(self, record_id: str, shared: Tensors) -> Tensors:
        own = {spec.name: shared.get(spec.name) for spec in self.identity.schema.tensors}
        if "teacher_pred" in own:
            own["teacher_pred"] = _random(
                f"{self.identity.id} {record_id}", shared["latents"].shape
            )
        return {name: tensor for name, tensor in own.items() if tensor is not None}

    def finish(self) -> None:
        empty = None
        if self.identity.kind == "text":
            empty = _empty_record(self.identity.schema, self.identity.fingerprint)
            self.folder.publish_bytes(EMPTY_RECORD_NAME, empty)
        digest = None if empty is None else hashlib.sha256(empty).hexdigest()
        manifest = Manifest.build(self.identity, 0, self.indices, empty_sha256=digest)
        self.folder.publish_bytes(MANIFEST_NAME, manifest.to_bytes())
        self.folder.close()


def _empty_record(schema: RecordSchema, fingerprint: str) -> bytes:
    header = RecordHeader.build(schema, 64, 64, fingerprint)
    return header.encode(random_record(header, 0))
