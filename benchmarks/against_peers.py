"""The join against its peers: the same records in the same batches, the output compared.

Each peer runs in its own environment and process; rounds alternate. All read from a hot cache in
one thread, unless its name says otherwise. Peers read in the order in which the records lie, the
join in the order of its schedule, which is the harder one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final, NamedTuple

import xxhash
from measuring.peer_process import PeerError, start_peers
from measuring.rounds import Sample, alternate, seconds
from measuring.row import Curve, Row
from measuring.scratch import scratch_folder
from measuring.script import run_alone
from measuring.sets import SetFolders, write_sets

from sdxl_distill.shards.safetensors_layout import byte_view
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.loader import JoinedStream

BATCH: Final = 8  # peers/peer.py reads the same
OURS: Final = "sdxl_distill"
RATIO: Final = f"{OURS} against it"
FIGURE: Final = "Joining three teachers, one thread, hot cache"


READING: Final = """
LitData and the memory-mapped file come closest: what is shared is copied only once there, too, as
only what a batch needs is stacked. Neither compares a digest, and neither joins by key when it
reads. Two worker processes made the loose files slower than none on a machine of two cores.

Twelve times webdataset is out of reach here: it leaves an image about as long as the read calls and
digests of the join take alone (`join`, "read calls and digests alone").
"""


class Peer(NamedTuple):
    """A script of peers/ and what it cannot do.

    Attributes:
        name: of the peer.
        lacks: what the join does and this does not.
        target: how much faster the join shall be.
    """

    name: str
    lacks: str
    target: float


PEERS: Final = {
    "webdataset_zip": Peer(
        "webdataset, zipped",
        "no join (zipped by hand, keys compared), no digests, no resume in an epoch, every "
        "shared tensor read three times",
        12.0,
    ),
    "mosaic": Peer(
        "MosaicML streaming",
        "no join (walked side by side), digests only when a shard is downloaded",
        1.0,
    ),
    "lit": Peer("LitData", "no join by key (walked side by side), no digests", 1.0),
    "energon": Peer(
        "Megatron-Energon",
        "joins by key when prepared, no digests, resumes with the same number of ranks only",
        1.0,
    ),
    "loose_files": Peer(
        "loose files, DataLoader", "joins by file name, no digests, no resume", 1.0
    ),
    "loose_files_workers": Peer(
        "loose files, DataLoader with 2 workers", "joins by file name, no digests, no resume", 1.0
    ),
    "memory_map": Peer(
        "one memory-mapped file",
        "joined beforehand: another teacher or image means writing it anew; no digests, no "
        "resume; a file that is cut kills the process",
        1.0,
    ),
}


def measure(small: bool) -> Iterator[Row | Curve]:
    """Read three teachers with the join and with every peer that runs here."""
    with scratch_folder() as folder, ExitStack() as stack:
        folders = write_sets(
            folder,
            num_records=2 * BATCH if small else 400,
            num_teachers=3,
            side_px=128 if small else 1024,
        )
        ours = _Ours(folders, stack)
        expected = ours.digests()
        contenders: dict[str, Callable[[], float]] = {OURS: seconds(ours.epoch)}
        for script, process in start_peers(PEERS, folder, small=small):
            try:
                if isinstance(process, PeerError):
                    raise process
                stack.enter_context(process)
                _require_equal(process.digests(), expected)
                contenders[script] = process.epoch_seconds
            except PeerError as error:
                name = PEERS[script].name
                yield Row.missing(RATIO, "×", str(error), conditions={"reader": name})
        found = alternate(contenders, 1 if small else 5)
        yield from _rows(found, folders.num_records)


def _rows(found: dict[str, Sample], num_records: int) -> Iterator[Row | Curve]:
    rates = {name: sample.rate_of(num_records) for name, sample in found.items()}
    yield Row.of(
        "images/s", rates[OURS], "images/s", against="digests on", conditions={"reader": OURS}
    )
    for script, sample in found.items():
        if script == OURS:
            continue
        peer = PEERS[script]
        conditions = {"reader": peer.name}
        yield Row.of(
            "images/s", rates[script], "images/s", against=peer.lacks, conditions=conditions
        )
        yield Row.of(
            RATIO,
            sample.over(found[OURS]),
            "×",
            target=peer.target,
            against="this reader",
            conditions=conditions,
        )
    names = {OURS: OURS, **{script: peer.name for script, peer in PEERS.items()}}
    lines = {names[name]: [(0.0, rate.median)] for name, rate in rates.items()}
    yield Curve(FIGURE, "", "images/s", lines)


class _Ours:
    """The join in the calling thread.

    Args:
        folders: of the sets.
        stack: closes what is opened.
    """

    def __init__(self, folders: SetFolders, stack: ExitStack) -> None:
        teachers = [stack.enter_context(open_shard_set(path)) for path in folders.teachers]
        self._stream = stack.enter_context(
            JoinedStream(teachers, global_batch=BATCH, num_threads=0)
        )

    def epoch(self) -> int:
        """Read every record once."""
        return sum(len(batch) for batch in self._stream.epoch(0))

    def digests(self) -> dict[str, str]:
        """Return key → digest of all tensors, as peers/peer.py makes it."""
        found: dict[str, str] = {}
        for batch in self._stream.epoch(0):
            for row, key in enumerate(batch.keys):
                found[key] = _digest(batch, row)
        return found


def _digest(batch: JoinedBatch, row: int) -> str:
    state = xxhash.xxh3_64()
    for tensor in (
        batch.latents,
        batch.time_ids,
        batch.encoder_hidden_states,
        batch.pooled_embeds,
        batch.noise,
        batch.timesteps.reshape(-1, 1),
        *batch.predictions,
    ):
        state.update(byte_view(tensor[row].contiguous()))
    return state.hexdigest()


def _require_equal(found: dict[str, str], expected: dict[str, str]) -> None:
    wrong = [key for key, digest in expected.items() if found.get(key) != digest]
    if wrong:
        raise PeerError(f"other output for {len(wrong)} of {len(expected)} records")


if __name__ == "__main__":
    run_alone(measure)
