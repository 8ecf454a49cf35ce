"""Small complete shard sets of random tensors that belong together, written by the real writer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_distill.core.image_id import image_id
from sdxl_distill.core.noise import NOISE_ALGORITHM, noise, noise_seed, timestep
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import (
    Layout,
    RecordHeader,
    latents_schema,
    predictions_schema,
    text_schema,
)
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME
from sdxl_distill.shards.set_identity import NoiseRecipe, SetIdentity, SetReference
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.shards.writer import ShardWriter
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location

ShardKey = tuple[int, int, int]
"""Width, height and number of a shard."""

NUM_CHANNELS, NUM_TOKENS, HIDDEN_SIZE, POOLED_SIZE = 4, 3, 8, 5
TEXT_ENCODERS = "1" * 64
SHARD_SIZES: dict[ShardKey, int] = {
    (64, 64, 0): 5,
    (64, 64, 1): 5,
    (64, 64, 2): 1,
    (64, 128, 0): 4,
    (64, 128, 1): 3,
}
NUMPY = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64}


@dataclass
class ShardSets:
    """A cache folder in which sets are built: `latents`, then `text` and `teacher`s.

    Attributes:
        root: `root/latents`, and `root/teachers/{set id}` for all others.
        shard_sizes: records of each shard; shards of 0 records are legal.
        base_seed: of teachers that do not say otherwise.
    """

    root: Path
    shard_sizes: Mapping[ShardKey, int] = field(default_factory=lambda: SHARD_SIZES)
    base_seed: int = 42

    def ids(self, place: ShardKey) -> list[str]:
        """Return the sorted image ids of a shard."""
        count = self.shard_sizes[place]
        return sorted(image_id(f"{place} {number}".encode()) for number in range(count))

    def latents(self, *, without: Iterable[ShardKey] = (), salt: str = "", **content: Any) -> Path:
        """Build the latents set; `salt` changes its tensors, nothing else."""
        identity = SetIdentity(
            kind="latents",
            id="latents",
            schema=latents_schema(NUM_CHANNELS),
            content={"vae": "2" * 64, "buckets": [[64, 64], [64, 128]], **content},
        )
        return self._build(identity, self.root / "latents", salt, without=without)

    def text(
        self,
        encoders: str = TEXT_ENCODERS,
        *,
        set_id: str | None = None,
        without: Iterable[ShardKey] = (),
    ) -> Path:
        """Build the text set of a pair of encoders."""
        set_id = set_id or f"text-{encoders[:12]}"
        directory = self.root / "teachers" / set_id
        identity = SetIdentity(
            kind="text",
            id=set_id,
            schema=text_schema(NUM_TOKENS, HIDDEN_SIZE, POOLED_SIZE),
            content={"text": encoders},
            latents=self._reference("latents", directory),
        )
        return self._build(identity, directory, without=without)

    def teacher(
        self,
        set_id: str,
        layout: Layout = "full",
        *,
        encoders: str = TEXT_ENCODERS,
        draws: int = 1,
        recipe: Mapping[str, Any] | None = None,
        schedule: NoiseSchedule | None = None,
        dtype: str = "F16",
        folder: str = "teachers",
        change: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
        without: Iterable[ShardKey] = (),
        **content: Any,
    ) -> Path:
        """Build a predictions set.

        Args:
            set_id: the teacher's id.
            layout: `compact` needs the text set of `encoders`, built before.
            encoders: fingerprint of the text encoders.
            draws: of each image.
            recipe: fields of the noise recipe that differ from the default.
            schedule: of the teacher.
            dtype: of the predictions, F16 or F32.
            folder: below `root`, which will hold the set.
            change: tensor name → what becomes of its values.
            without: shards that are left out.
            content: further fields of the set record's content.
        """
        directory = self.root / folder / set_id
        sizes = (NUM_CHANNELS, NUM_TOKENS, HIDDEN_SIZE, POOLED_SIZE)
        fields: dict[str, Any] = {
            "algorithm": NOISE_ALGORITHM,
            "base_seed": self.base_seed,
            "min_timestep": 0,
            "max_timestep": 1000,
        }
        is_compact = layout == "compact"
        text_location = f"teachers/text-{encoders[:12]}"
        identity = SetIdentity(
            kind="predictions",
            id=set_id,
            schema=predictions_schema(layout, dtype, *sizes),
            content={"teacher": image_id(set_id.encode()), "text": encoders, **content},
            layout=layout,
            noise=NoiseRecipe(**fields | dict(recipe or {})),
            noise_schedule=schedule or NoiseSchedule(),
            latents=self._reference("latents", directory),
            text=self._reference(text_location, directory) if is_compact else None,
        )
        return self._build(identity, directory, draws=draws, change=change or {}, without=without)

    def opened_teachers(self, *layouts: Layout, draws: int = 1) -> list[ShardSet]:
        """Build teachers called a, b, …, one for each layout given, and open them."""
        if "compact" in layouts:
            self.text()
        return [
            open_shard_set(self.teacher(chr(ord("a") + row), layout, draws=draws))
            for row, layout in enumerate(layouts)
        ]

    def _reference(self, place: str, directory: Path) -> SetReference:
        target = open_shard_set(self.root / place)
        return SetReference.between(
            target.manifest.identity.fingerprint, Location(directory), target.location
        )

    def _build(
        self,
        identity: SetIdentity,
        directory: Path,
        salt: str = "",
        *,
        draws: int = 1,
        change: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
        without: Iterable[ShardKey] = (),
    ) -> Path:
        sources = {}
        if identity.kind != "latents":
            sources = {
                entry[:3]: entry.tar_sha256
                for entry in open_shard_set(self.root / "latents").manifest.shards
            }
        indices: list[ShardIndex] = []
        with Directory(directory, create=True) as folder:
            folder.publish_bytes("set.json", identity.to_bytes())
            for place in set(self.shard_sizes) - set(without):
                for draw in range(draws):
                    name = ShardName(identity.id, *place, draw)
                    header = RecordHeader.build(
                        identity.schema, *place[:2], identity.fingerprint, sources.get(place)
                    )
                    indices.append(self._write_shard(folder, identity, name, header, salt, change))
            empty = _empty_record(identity) if identity.kind == "text" else None
            if empty is not None:
                folder.publish_bytes(EMPTY_RECORD_NAME, empty)
            digest = None if empty is None else hashlib.sha256(empty).hexdigest()
            manifest = Manifest.build(identity, 0, indices, empty_sha256=digest)
            folder.publish_bytes("manifest.json", manifest.to_bytes())
        return directory

    def _write_shard(
        self,
        folder: Directory,
        identity: SetIdentity,
        name: ShardName,
        header: RecordHeader,
        salt: str,
        change: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None,
    ) -> ShardIndex:
        with folder.stage() as staged:
            writer = ShardWriter(staged, name, header)
            for record_id in self.ids((name.width, name.height, name.number)):
                tensors = record_tensors(identity, name, record_id, salt)
                digest = None
                if header.recreates_noise:
                    digest = tensor_digest(noise(int(tensors["seed"][0]), name.width, name.height))
                for tensor, function in (change or {}).items():
                    tensors[tensor] = function(tensors[tensor])
                sidecar = b'{"captions":["a cat"]}' if identity.kind == "latents" else None
                writer.write(name.key(record_id), header.encode(tensors), sidecar, digest)
            index = writer.close()
            folder.publish(staged, name.tar)
        folder.publish_bytes(name.idx, index.to_bytes())
        return index


def path_of(shard_set: ShardSet) -> Path:
    """Return the folder of a set as a path."""
    return Path(str(shard_set.location))


def record_tensors(
    identity: SetIdentity, name: ShardName, record_id: str, salt: str = ""
) -> dict[str, np.ndarray]:
    """Return the tensors of one record: random, but what the id or the caption determines."""
    values = {
        tensor: _random(
            f"{salt}{_owner(identity, tensor)}/{tensor}/{name.key(record_id)}", shape
        ).astype(NUMPY[dtype])
        for tensor, (dtype, shape) in identity.schema.resolve(name.width, name.height).items()
    }
    recipe = identity.noise
    if recipe is not None:
        seed = noise_seed(record_id, recipe.base_seed, name.draw)
        exact = {
            "seed": np.array([seed]),
            "timestep": np.array(
                [
                    timestep(
                        record_id,
                        recipe.base_seed,
                        name.draw,
                        recipe.min_timestep,
                        recipe.max_timestep,
                    )
                ]
            ),
            "resolution": np.array([name.width, name.height], np.int32),
            "noise": noise(seed, name.width, name.height),
        }
        values |= {tensor: value for tensor, value in exact.items() if tensor in values}
        values["teacher_pred"] += name.draw
    return values


def _owner(identity: SetIdentity, tensor: str) -> str:
    """Return what besides the image determines a tensor: the text encoders, or the set."""
    if tensor in ("encoder_hidden_states", "pooled_embeds"):
        return identity.content["text"]
    return identity.id


def _random(label: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big")
    return 9 * np.random.Generator(np.random.Philox(seed)).standard_normal(shape)


def _empty_record(identity: SetIdentity) -> bytes:
    header = RecordHeader.build(identity.schema, 64, 64, identity.fingerprint)
    name = ShardName(identity.id, 64, 64, 0)
    return header.encode(record_tensors(identity, name, image_id(b"")))
