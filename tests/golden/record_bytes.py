"""Golden bytes of a record, its index, set record and manifest; to change one breaks all sets."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.memory_file import MemoryFile

from sdxl_distill.core.image_id import ids_digest, image_id
from sdxl_distill.core.noise import NOISE_ALGORITHM, noise, noise_seed, timestep
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import RecordHeader, latents_schema, predictions_schema
from sdxl_distill.shards.set_identity import NoiseRecipe, SetIdentity, SetReference
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.writer import ShardWriter

SIDE_PX = 16
IDENTITY = image_id(b"golden image")


def build() -> dict[str, Any]:
    """Write latents and one compact predictions shard of one record each."""
    latents = SetIdentity("latents", "latents", latents_schema(), {"vae": "1" * 64})
    predictions = SetIdentity(
        "predictions",
        "teacher",
        predictions_schema("compact", "F16", 4, 77, 2048, 1280),
        {"teacher": "2" * 64, "version": "1"},
        layout="compact",
        noise=NoiseRecipe(NOISE_ALGORITHM, 42, 0, 1000),
        noise_schedule=NoiseSchedule(),
        latents=SetReference(latents.fingerprint, "../latents"),
        text=SetReference("3" * 64, "../text"),
    )
    planned, sidecar = ids_digest(_ids()), b'{"captions":["a cat"]}'
    return {
        # As versions wrote it whose latents shards named no source: such sets are read.
        "latents": _build_shard(latents, None, _latents_tensors(), sidecar, None),
        "latents_bound_to_the_catalog": _build_shard(
            latents, planned, _latents_tensors(), sidecar, None
        ),
        "predictions": _build_shard(predictions, "4" * 64, *_predictions()),
    }


def _ids() -> np.ndarray:
    return np.frombuffer(bytes.fromhex(IDENTITY), np.uint8).reshape(1, 16)


def _latents_tensors() -> dict[str, np.ndarray]:
    return {
        "latents": np.arange(16, dtype=np.float16).reshape(4, 2, 2) / 8,
        "time_ids": np.array([480, 640, 0, 3, SIDE_PX, SIDE_PX], np.int32),
    }


def _predictions() -> tuple[dict[str, np.ndarray], None, int]:
    seed = noise_seed(IDENTITY, 42)
    tensors = {
        "teacher_pred": np.arange(16, dtype=np.float16).reshape(4, 2, 2) / -8,
        "timestep": np.array([timestep(IDENTITY, 42, 0, 0, 1000)]),
        "seed": np.array([seed]),
        "resolution": np.array([SIDE_PX, SIDE_PX], np.int32),
    }
    return tensors, None, tensor_digest(noise(seed, SIDE_PX, SIDE_PX))


def _build_shard(
    identity: SetIdentity,
    source: str | None,
    tensors: dict[str, np.ndarray],
    sidecar: bytes | None,
    noise_digest: int | None,
) -> dict[str, Any]:
    name = ShardName(identity.id, SIDE_PX, SIDE_PX, 0)
    header = RecordHeader.build(identity.schema, SIDE_PX, SIDE_PX, identity.fingerprint, source)
    content = header.encode(tensors)
    index = _write(name, header, content, sidecar, noise_digest)
    return {
        "set_record": identity.to_bytes().decode(),
        "record_hex": content.hex(),
        "index_hex": index.to_bytes().hex(),
        "tar_sha256": index.tar_sha256,
        "manifest": Manifest.build(identity, 0, [index]).to_bytes().decode(),
    }


def _write(
    name: ShardName,
    header: RecordHeader,
    content: bytes,
    sidecar: bytes | None,
    noise_digest: int | None,
) -> ShardIndex:
    writer = ShardWriter(MemoryFile(), name, header)
    writer.write(name.key(IDENTITY), content, sidecar, noise_digest)
    return writer.close()
