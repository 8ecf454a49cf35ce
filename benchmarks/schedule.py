"""The stream order: what it costs to plan an epoch and to look a step up, up to 10⁹ records.

The plan of one of 1,024 ranks; the peers' own planners make the plan of the same number of
records, as far as they get in 20 seconds and 8 GiB.
"""

from __future__ import annotations

import json
import resource
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from measuring.peer_process import PEER_PYTHON, PEER_SCRIPTS, PeerError, install_peers
from measuring.rounds import Sample, alternate
from measuring.row import Curve, Row
from measuring.script import run_alone

from sdxl_distill.core.bucket import SDXL_BUCKETS
from sdxl_distill.order.shard_table import ShardTable
from sdxl_distill.order.stream_order import StreamOrder

RANKS: Final = 1024
RECORDS_PER_RANK: Final = 32
STEPS_AT_ONCE: Final = 64
PLAN_SECONDS, PLAN_BYTES = 0.2, 64 * 2**20
STEP_SECONDS, LONE_STEP_SECONDS = 20e-6, 1e-3
TIME_FIGURE: Final = "Planning an epoch: seconds"
MEMORY_FIGURE: Final = "Planning an epoch: memory"
PLANNERS: Final = {"mosaic": "MosaicML streaming", "lit": "LitData"}
_PEER_SECONDS, _PEER_BYTES = 20, 8 << 30
_OURS: Final = "sdxl_distill"


READING: Final = """
Time and memory of a plan grow with the shards, not with the records: 10⁹ records in shards of 512
are two million shards, and their plan takes longer than the target and more memory. MosaicML plans
every sample and LitData every chunk for every rank, in Python. Memory is the peak of traced
allocations here, and the growth of the process's peak for the peers: a coarser gauge.
"""


def measure(small: bool) -> Iterator[Row | Curve]:
    """Plan 10⁴ … 10⁹ records with the stream order and with the peers' planners."""
    exponents = range(4, 6 if small else 10)
    times: dict[str, list[tuple[float, float]]] = {_OURS: []}
    memories: dict[str, list[tuple[float, float]]] = {_OURS: []}
    for exponent in exponents:
        seconds, num_bytes = _plan_cost(10**exponent, records_per_shard=512)
        times[_OURS].append((10**exponent, seconds))
        memories[_OURS].append((10**exponent, num_bytes / 2**20))
    yield from _planners(exponents, times, memories, small=small)
    yield Curve(TIME_FIGURE, "records", "s", times, is_log=True)
    yield Curve(MEMORY_FIGURE, "records", "MiB", memories, is_log=True)
    largest = 10 ** exponents[-1]
    # A shard of 10⁴ records is of the size that 10⁹ records ask for; 512 is the default.
    for records_per_shard, num_rounds in ((10_000, 9), (512, 3)):
        yield from _rows(largest, records_per_shard, 1 if small else num_rounds)


def _rows(num_records: int, records_per_shard: int, num_rounds: int) -> Iterator[Row]:
    conditions = {
        "planner": _OURS,
        "records": f"{num_records:.0e}",
        "records of a shard": f"{records_per_shard:,}",
        "ranks": f"{RANKS:,}",
    }
    is_target = records_per_shard == 10_000
    costs = [_plan_cost(num_records, records_per_shard) for _ in range(num_rounds + 1)][1:]
    yield Row.of(
        "plan an epoch",
        Sample(tuple(seconds for seconds, _ in costs)),
        "s",
        conditions=conditions,
        better="lower",
        target=PLAN_SECONDS if is_target else None,
    )
    yield Row.of(
        "memory of the plan",
        Sample(tuple(num_bytes / 2**20 for _, num_bytes in costs)),
        "MiB",
        conditions=conditions,
        better="lower",
        target=PLAN_BYTES / 2**20 if is_target else None,
    )
    order = _schedule(num_records, records_per_shard)
    found = alternate(
        {
            "at once": _step_seconds(order, STEPS_AT_ONCE),
            "alone": _step_seconds(order, 1),
        },
        num_rounds,
    )
    for name, target in (("at once", STEP_SECONDS), ("alone", LONE_STEP_SECONDS)):
        yield Row.of(
            f"look up a step, {STEPS_AT_ONCE if name == 'at once' else 1} {name}",
            found[name].scaled(1e6),
            "µs",
            conditions=conditions,
            better="lower",
            target=target * 1e6,
            against=f"{RECORDS_PER_RANK} records per rank",
        )


def _planners(
    exponents: range,
    times: dict[str, list[tuple[float, float]]],
    memories: dict[str, list[tuple[float, float]]],
    *,
    small: bool,
) -> Iterator[Row]:
    """Run the peers' planners until one takes too long, and note where it stopped."""
    try:
        install_peers(small=small)
    except PeerError as error:
        for name in PLANNERS.values():
            yield Row.missing("plan an epoch", "s", str(error), {"planner": name})
        return
    for script, name in PLANNERS.items():
        times[name], memories[name] = [], []
        for exponent in exponents:
            cost = _peer_cost(script, 10**exponent)
            if cost is None:
                yield Row.missing(
                    "plan an epoch",
                    "s",
                    f"not in {_PEER_SECONDS} s and {_PEER_BYTES >> 30} GiB",
                    {"planner": name, "records": f"{10**exponent:.0e}"},
                )
                break
            times[name].append((10**exponent, cost[0]))
            memories[name].append((10**exponent, cost[1] / 2**20))
        if times[name]:
            (num_records, seconds), (_, mebibytes) = times[name][-1], memories[name][-1]
            for metric, value, unit in (
                ("plan an epoch", seconds, "s"),
                ("memory of the plan", mebibytes, "MiB"),
            ):
                conditions = {"planner": name, "records": f"{num_records:.0e}"}
                yield Row(metric, value, unit, None, "lower", "its own planner", None, conditions)


def _schedule(num_records: int, records_per_shard: int) -> StreamOrder:
    buckets = tuple(sorted(SDXL_BUCKETS))
    num_shards = max(len(buckets), num_records // records_per_shard)
    bucket = np.arange(num_shards) % len(buckets)
    number = np.arange(num_shards) // len(buckets)
    count = np.full(num_shards, num_records // num_shards)
    table = ShardTable(bucket, number, np.zeros_like(count), count, buckets)
    return StreamOrder(table, seed=42, global_batch=RANKS * RECORDS_PER_RANK, lanes=RANKS)


def _plan_cost(num_records: int, records_per_shard: int) -> tuple[float, float]:
    """Return seconds, and the peak of traced bytes, from the table's columns to the first steps."""

    def plan() -> None:
        order = _schedule(num_records, records_per_shard)
        stop = min(order.steps(0), STEPS_AT_ONCE)
        list(order.batches(0, 0, stop, rank=0, world=RANKS))

    start = time.perf_counter()
    plan()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    plan()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak_bytes


def _step_seconds(order: StreamOrder, num_at_once: int) -> Callable[[], float]:
    """Return a contender that looks steps up in the middle of an epoch."""
    first = order.steps(0) // 2
    num_calls = 512 // num_at_once

    def run() -> float:
        num_steps = 0
        start = time.perf_counter()
        for call in range(num_calls):
            step = min(first + call * num_at_once, max(0, order.steps(0) - num_at_once))
            stop = min(step + num_at_once, order.steps(0))
            num_steps += len(list(order.batches(0, step, stop, rank=0, world=RANKS)))
        return (time.perf_counter() - start) / max(1, num_steps)

    return run


def _peer_cost(script: str, num_records: int) -> tuple[float, float] | None:
    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_PEER_BYTES, _PEER_BYTES))

    command: list[str | Path] = [PEER_PYTHON, PEER_SCRIPTS / "planners.py", script]
    try:
        done = subprocess.run(
            [*command, str(num_records)],
            capture_output=True,
            text=True,
            timeout=_PEER_SECONDS,
            check=True,
            preexec_fn=limit_memory,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    cost = json.loads(done.stdout.splitlines()[-1])
    return cost["seconds"], cost["bytes"]


if __name__ == "__main__":
    run_alone(measure)
