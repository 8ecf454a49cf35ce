"""What every peer does: convert the sets once, then read an epoch of batches whenever asked.

Each peer is a script, `python peers/NAME.py FOLDER`: it prepares its own files from the sets in
FOLDER, says so in one line of JSON, and answers each line on its input: `epoch` with the seconds
that it took, `digests` with a digest of every record.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from sdxl_distill.shards.safetensors_layout import byte_view
from sdxl_distill.shards.shard_set import open_shard_set

Record = dict[str, torch.Tensor]
Batch = tuple[list[str], Record]
"""Keys, and tensors [B, …] by the names of `TENSORS` and `prediction_{number}`."""

TENSORS = ("latents", "time_ids", "encoder_hidden_states", "pooled_embeds", "noise", "timestep")
BATCH = 8


def set_folders(root: Path) -> list[Path]:
    """Return the latents set and the teachers."""
    return [root / "latents", *sorted(root.glob("teacher_*"))]


def records(folder: Path) -> Iterator[tuple[str, Record]]:
    """Yield key and tensors of every record of a set."""
    with open_shard_set(folder) as shard_set:
        for name in shard_set.manifest.names():
            reader = shard_set.reader(name)
            for record in range(reader.index.num_records):
                yield reader.index.key(record), reader.read_record(record)


def joined(latents: Record, teachers: Iterable[Record]) -> Record:
    """Return what training needs of one image: everything once, and every prediction."""
    rows = list(teachers)
    record = {name: rows[0][name] for name in TENSORS[2:]}
    record["latents"], record["time_ids"] = latents["latents"], latents["time_ids"]
    for number, row in enumerate(rows):
        record[f"prediction_{number}"] = row["teacher_pred"]
    return record


def batches(rows: Iterable[tuple[str, Record]]) -> Iterator[Batch]:
    """Stack joined records to batches."""
    keys: list[str] = []
    waiting: list[Record] = []
    for key, record in rows:
        keys.append(key)
        waiting.append(record)
        if len(waiting) == BATCH:
            yield keys, {name: torch.stack([row[name] for row in waiting]) for name in record}
            keys, waiting = [], []


def require_same_key(keys: Iterable[str]) -> str:
    """Return the key that all sets have at one place."""
    (key,) = set(keys)
    return key


def digests(epoch: Iterable[Batch]) -> dict[str, str]:
    """Return key → digest of all tensors of the record."""
    found: dict[str, str] = {}
    for keys, tensors in epoch:
        names = (*TENSORS, *sorted(set(tensors) - set(TENSORS)))
        for row, key in enumerate(keys):
            state = xxhash.xxh3_64()
            for name in names:
                state.update(byte_view(tensors[name][row].contiguous()))
            found[key] = state.hexdigest()
    return found


def serve(prepare: Callable[[Path, Path], Callable[[], Iterator[Batch]]]) -> None:
    """Answer on what was standard output; whatever a library prints goes to standard error.

    Args:
        prepare: converts the sets in its first argument to files in the second, and returns a
            function that reads an epoch.
    """
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    root = Path(sys.argv[1])
    own = root / Path(sys.argv[0]).stem
    own.mkdir()
    epoch = prepare(root, own)
    answer("ready")
    for request in sys.stdin:
        if request.strip() == "digests":
            answer(digests(epoch()))
            continue
        start = time.perf_counter()
        num_records = sum(len(keys) for keys, _ in epoch())
        answer({"seconds": time.perf_counter() - start, "records": num_records})
