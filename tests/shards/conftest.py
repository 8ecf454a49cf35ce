"""Small shard sets of real bytes, written by the writer itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sdxl_distill.core.image_id import image_id
from sdxl_distill.core.noise import NOISE_ALGORITHM, noise, noise_seed, timestep
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import (
    RecordHeader,
    encode_record,
    latents_schema,
    predictions_schema,
    text_schema,
)
from sdxl_distill.shards.set_identity import NoiseRecipe, SetIdentity, SetReference
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.writer import ShardWriter
from sdxl_distill.storage.fsio import Directory

Tensors = Mapping[str, np.ndarray]
Layouts = tuple[tuple[int, int, int], ...]

TOKENS, HIDDEN, POOLED = 3, 4, 5
SOURCE = "5" * 64
NUMPY = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64}


def sorted_ids(count: int, salt: str = "") -> list[str]:
    return sorted(image_id(f"{salt}{number}".encode()) for number in range(count))


@dataclass
class SmallSet:
    """A set being built in `directory`, with all that was written kept to compare."""

    directory: Path
    identity: SetIdentity
    written: dict[tuple[ShardName, int], Tensors]
    indices: list[ShardIndex]

    def header(self, name: ShardName) -> RecordHeader:
        source = None if self.identity.kind == "latents" else SOURCE
        return RecordHeader.build(
            self.identity.schema, name.width, name.height, self.identity.fingerprint, source
        )

    def tensors(self, name: ShardName, identity: str) -> Tensors:
        seed = noise_seed(identity, 42, name.draw)
        generator = np.random.Generator(np.random.Philox(seed))
        values: dict[str, np.ndarray] = {}
        for tensor, (dtype, shape) in self.identity.schema.resolve(name.width, name.height).items():
            values[tensor] = (9 * generator.standard_normal(shape)).astype(NUMPY[dtype])
        exact = {
            "seed": np.array([seed]),
            "timestep": np.array([timestep(identity, 42, name.draw, 0, 1000)]),
            "resolution": np.array([name.width, name.height], np.int32),
            "noise": noise(seed, name.width, name.height),
        }
        return values | {key: value for key, value in exact.items() if key in values}

    def add_shard(self, name: ShardName, identities: list[str]) -> ShardIndex:
        header = self.header(name)
        with Directory(self.directory) as directory, directory.stage() as staged:
            writer = ShardWriter(staged, name, header)
            for number, identity in enumerate(identities):
                tensors = self.tensors(name, identity)
                self.written[name, number] = tensors
                writer.write(
                    name.key(identity),
                    header.encode(tensors),
                    self.sidecar(identity),
                    self.noise_digest(name, identity) if header.recreates_noise else None,
                )
            index = writer.close()
            directory.publish(staged, name.tar)
            directory.publish_bytes(name.idx, index.to_bytes())
        self.indices.append(index)
        return index

    def sidecar(self, identity: str) -> bytes | None:
        if self.identity.kind != "latents":
            return None
        return json.dumps({"captions": ["a cat"] * (int(identity[0], 16) + 1)}).encode()

    def noise_digest(self, name: ShardName, identity: str) -> int:
        seed = noise_seed(identity, 42, name.draw)
        return tensor_digest(noise(seed, name.width, name.height))

    def finish(self, catalog: int = 0) -> Manifest:
        empty = None
        with Directory(self.directory) as directory:
            if self.identity.kind == "text":
                header = self.header(ShardName(self.identity.id, 64, 64, 0))
                tensors = self.tensors(ShardName(self.identity.id, 64, 64, 0), sorted_ids(1)[0])
                content = encode_record(tensors, {"fingerprint": header.fingerprint})
                directory.publish_bytes("empty.safetensors", content)
                empty = hashlib.sha256(content).hexdigest()
            manifest = Manifest.build(self.identity, catalog, self.indices, (), empty)
            directory.publish_bytes("set.json", self.identity.to_bytes())
            directory.publish_bytes("manifest.json", manifest.to_bytes())
        return manifest


def set_record(kind: str, layout: str = "full", **changes: object) -> SetIdentity:
    latents, text = SetReference("1" * 64, "../latents"), SetReference("2" * 64, "../text")
    if kind == "latents":
        fields: dict = {"kind": kind, "id": "latents", "schema": latents_schema()}
    elif kind == "text":
        schema = text_schema(TOKENS, HIDDEN, POOLED)
        fields = {"kind": kind, "id": "text", "schema": schema, "latents": latents}
    else:
        fields = {
            "kind": "predictions",
            "id": "teacher.v1",
            "schema": predictions_schema(layout, "F16", 4, TOKENS, HIDDEN, POOLED),  # type: ignore[arg-type]
            "content": {"teacher": "3" * 64, "version": "1"},
            "layout": layout,
            "noise": NoiseRecipe(NOISE_ALGORITHM, 42, 0, 1000),
            "noise_schedule": NoiseSchedule(),
            "latents": latents,
            "text": text if layout == "compact" else None,
        }
    return SetIdentity(**{**fields, **changes})


class SetFactory:
    """Makes sets in folders of their own below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, kind: str = "predictions", layout: str = "full", **changes: object) -> SmallSet:
        identity = set_record(kind, layout, **changes)
        directory = self.root / identity.id
        directory.mkdir()
        return SmallSet(directory, identity, {}, [])

    def complete(
        self,
        kind: str = "predictions",
        layout: str = "full",
        *,
        shards: Layouts = ((64, 64, 3), (64, 64, 2), (64, 128, 2)),
        draws: int = 1,
        **changes: object,
    ) -> SmallSet:
        """Write a set whose shards are given as (width, height, number of records)."""
        small = self.start(kind, layout, **changes)
        for position, (width, height, count) in enumerate(shards):
            number = sum(1 for other in shards[:position] if other[:2] == (width, height))
            for draw in range(draws):
                name = ShardName(small.identity.id, width, height, number, draw)
                small.add_shard(name, sorted_ids(count, salt=f"{position}-"))
        small.finish()
        return small


@pytest.fixture
def sets(tmp_path: Path) -> SetFactory:
    return SetFactory(tmp_path)


@pytest.fixture
def ids() -> Callable[..., list[str]]:
    return sorted_ids
