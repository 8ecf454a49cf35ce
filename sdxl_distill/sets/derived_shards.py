"""How text and predictions sets follow a latents set: shard for shard, key for key."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sdxl_distill.builder.launch import Launch
from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import ShardSet


def latents_name(latents: ShardSet, name: ShardName) -> ShardName:
    """Return the latents shard that a shard of another set is aligned with."""
    return ShardName(latents.id, name.width, name.height, name.number)


def planned_after(latents: ShardSet, set_id: str, num_draws: int = 1) -> list[PlannedShard]:
    """Return the shards of a set that follows a latents set: one for each of its shards and draw.

    Draws come one after the other, so that the set grows evenly and its first draw comes first.
    """
    return [
        PlannedShard(
            ShardName(set_id, entry.width, entry.height, entry.number, draw),
            entry.num_records,
            entry.tar_sha256,
        )
        for draw in range(num_draws)
        for entry in latents.manifest.shards
    ]


def holds_same_keys(index: ShardIndex, latents: ShardSet) -> bool:
    """Whether a shard holds the keys of the latents shard that it is aligned with."""
    return (
        index.keys_digest == latents.manifest.entry(latents_name(latents, index.name)).keys_digest
    )


def decide_identity(launch: Launch, name: str, decision: Callable[[], SetIdentity]) -> SetIdentity:
    """Return the identity of a set that rank 0 decides on; arguments and errors as `decide`."""
    decode = partial(SetIdentity.from_json, where="launch")
    return launch.decide(name, decision, encode=SetIdentity.to_json, decode=decode)
