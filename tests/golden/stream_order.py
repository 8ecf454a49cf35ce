"""The stream order of small tables: the golden file pins it for every version of numpy."""

from __future__ import annotations

import hashlib

import numpy as np

from sdxl_distill.order.stream_order import ShardTable, StreamOrder

ROWS = [
    (1024, 1024, 0, 2, 60),
    (1024, 1024, 1, 0, 64),
    (1024, 1024, 2, 1, 63),
    (1024, 1024, 5, 0, 17),
    (896, 1152, 0, 0, 40),
    (896, 1152, 1, 64, 0),
    (640, 1536, 0, 0, 3),
]
MANY_ROWS = [(1024, 1024, number, 0, 4 + number % 3) for number in range(40)]
SETTINGS = {
    "one lap is larger than the window": {"global_batch": 12, "lanes": 4, "window": 24},
    "the window covers every lap": {"global_batch": 16, "num_draws": 3},
    "every batch holds many laps": {"global_batch": 512, "lanes": 8, "window": 1},
}


def build() -> dict[str, object]:
    """Return per setting: fingerprint, first batch, and SHA-256 of the batches of three epochs."""
    table = ShardTable.from_rows(ROWS)
    orders = {name: StreamOrder(table, seed=42, **s) for name, s in SETTINGS.items()}
    # Of the rows above each has a home lane of its own, where nothing is left to be shuffled.
    many = ShardTable.from_rows(MANY_ROWS)
    orders["home lanes hold many shards"] = StreamOrder(
        many, seed=42, global_batch=8, lanes=4, window=16
    )
    return {name: _order(order) for name, order in orders.items()}


def _order(order: StreamOrder) -> dict[str, object]:
    batches = [b for e in range(3) for b in order.batches(e, 0, order.steps(e))]
    digest = hashlib.sha256()
    for batch in batches:
        columns = [np.full(batch.positions.shape, batch.bucket), *batch[3:]]
        digest.update(np.stack(columns).astype("<i8").tobytes())
    first = batches[0]
    return {
        "fingerprint": order.fingerprint(),
        "steps": [order.steps(epoch) for epoch in range(3)],
        "first_batch": {
            "bucket": first.bucket,
            "shards": first.shards[:8].tolist(),
            "records": first.records[:8].tolist(),
            "draws": first.draws[:8].tolist(),
        },
        "batches_sha256": digest.hexdigest(),
    }
