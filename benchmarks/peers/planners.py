"""Plans one epoch of 1,024 ranks as MosaicML streaming or LitData do; prints seconds and bytes.

`python peers/planners.py {mosaic,lit} RECORDS`: one planner in one process, so that the growth of
its peak memory is the planner's.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

RECORDS_PER_SHARD, RANKS, RANKS_PER_NODE, RANK_BATCH, SEED = 512, 1024, 8, 32, 7


def mosaic(num_records: int) -> Callable[[], object]:
    """MosaicML: partitions of all samples, then a permutation of all samples."""
    import mosaic  # noqa: F401, PLC0415 - makes streaming importable without torchvision
    from streaming.base.partition import get_partitions  # noqa: PLC0415
    from streaming.base.shuffle import get_shuffle  # noqa: PLC0415

    sizes = np.full(num_records // RECORDS_PER_SHARD, RECORDS_PER_SHARD)
    nodes = RANKS // RANKS_PER_NODE

    def plan() -> object:
        total = int(sizes.sum())
        partitions = get_partitions("relaxed", total, nodes, nodes, RANKS_PER_NODE, 1, RANK_BATCH)
        return partitions, get_shuffle("py1e", sizes, nodes, SEED, 0)

    return plan


def lit(num_records: int) -> Callable[[], object]:
    """LitData: a permutation of the chunks, dealt out to the ranks."""
    from litdata.streaming.item_loader import Interval  # noqa: PLC0415
    from litdata.utilities.env import _DistributedEnv  # noqa: PLC0415
    from litdata.utilities.shuffle import (  # noqa: PLC0415
        _associate_chunks_and_intervals_to_workers,
    )

    num_chunks = num_records // RECORDS_PER_SHARD
    world = _DistributedEnv(RANKS, 0, RANKS // RANKS_PER_NODE)

    def plan() -> object:
        order = np.random.Generator(np.random.PCG64(SEED)).permutation(num_chunks)
        starts = (order * RECORDS_PER_SHARD).tolist()
        intervals = [
            Interval(start, start, start + RECORDS_PER_SHARD, start + RECORDS_PER_SHARD)
            for start in starts
        ]
        return _associate_chunks_and_intervals_to_workers(
            world, order, intervals, batch_size=RANK_BATCH
        )

    return plan


def main() -> None:
    """Plan once and print what it took."""
    plan = {"mosaic": mosaic, "lit": lit}[sys.argv[1]](int(sys.argv[2]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = plan()
    seconds = time.perf_counter() - start
    peak_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    del result
    print(json.dumps({"seconds": seconds, "bytes": peak_bytes}))


if __name__ == "__main__":
    main()
