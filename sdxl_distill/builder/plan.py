"""What is to be built: planned shards, and one worker's part in building a set of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdxl_distill.builder.work_queue import WorkQueue
from sdxl_distill.runtime.stop_request import StopRequest
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.fsio import Directory


@dataclass(frozen=True)
class PlannedShard:
    """One unit of work.

    Attributes:
        name: the shard's name.
        num_records: the number of records that it will hold at most; for the progress bar.
        source_sha256: the digest of the latents shard that it is made from; in a latents set the
            digest of the ids that the catalog planned for it, None where an earlier version
            built it.
    """

    name: ShardName
    num_records: int
    source_sha256: str | None = None


@dataclass(frozen=True)
class SetBuild:
    """One worker's part in building a set.

    Attributes:
        folder: the set's folder, opened before it was looked at.
        queue: the claims on the set.
        identity: the identity of the set, as its `set.json` says.
        shards: all shards of the set, the same list for every worker.
        stop: the request that ends the work early.
    """

    folder: SetFolder[Directory]
    queue: WorkQueue
    identity: SetIdentity
    shards: Sequence[PlannedShard]
    stop: StopRequest

    @property
    def directory(self) -> Directory:
        """The set's folder, to be written."""
        return self.folder.folder
