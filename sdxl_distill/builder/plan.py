"""What is to be built: one planned shard per unit of work."""

from __future__ import annotations

from dataclasses import dataclass

from sdxl_distill.shards.shard_name import ShardName


@dataclass(frozen=True)
class PlannedShard:
    """One unit of work.

    Attributes:
        name: of the shard.
        num_records: that it will hold, at most; for progress.
        source_sha256: of the latents shard that it is made from; in a latents set the digest of
            the ids that the catalog planned for it, None where an earlier version built it.
    """

    name: ShardName
    num_records: int
    source_sha256: str | None = None
