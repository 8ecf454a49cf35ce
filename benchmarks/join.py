"""Reading and joining: the loader against a raw sequential read of the same files.

A join beats the raw read because what the sets share is read once: of three teachers' 1.74 MB
per image, 0.84 MB. Digests are always on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from measuring.read_calls import ReadCalls
from measuring.rounds import Sample, alternate, seconds
from measuring.row import Condition, Curve, Row
from measuring.scratch import read_all, read_buffer, scratch_folder
from measuring.script import run_alone
from measuring.sets import SetFolders, forget_cached_pages, write_sets

from sdxl_distill.core.noise import noise
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.record import Layout
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.stream.loader import JoinedStream

NUM_TEACHERS: Final = (1, 2, 3, 5, 8)
NUM_THREADS: Final = (0, 1, 2, 4)  # beside the caller, who reads when he would have to wait
BATCH: Final = 8
HOT_TARGET: Final = 1.3
COLD_TARGET: Final = 0.9
FIGURE_TEACHERS: Final = "Joining, hot cache, one thread"
FIGURE_THREADS: Final = "Joining three teachers, threads"


READING: Final = """
The raw read has two rates, and the target is judged against both. malloc puts large memory 16 bytes
behind the begin of a page, where the kernel's copy was measured at half the speed or less on this
processor; batches are laid out to avoid that (`stream/batch.py`). The faster of the two is
out of reach: it reads all bytes into 4 MiB that stay in the processor's cache, a join writes into
two batches. Its bare read calls and digests, without order or checks, are rows of their own; what
the join adds to them is some 50 µs of Python an image. From a hot cache reader threads add little,
since each holds the interpreter for too short a time to be worth the hand-over; from a disk they do
help.

Layout `compact` is bound by noise that is drawn anew, about 0.9 ms for an image and thread, hot or
cold: more than a fast disk needs, and far less than a UNet needs. It grows with the cores. "Of
reading and drawing noise alone" compares the join with the raw read beside threads that draw the
noise.
"""


def measure(small: bool) -> Iterator[Row | Curve]:
    """Read by number of teachers, by threads, and from a cold cache; both layouts."""
    for layout in ("full", "compact"):
        with scratch_folder() as folder, ExitStack() as stack:
            folders = write_sets(
                folder,
                num_records=BATCH if small else 400,
                num_teachers=max(NUM_TEACHERS),
                layout=layout,
                side_px=128 if small else 1024,
            )
            bench = _JoinBench(folders, layout, 1 if small else 7, stack)
            yield from bench.by_teachers()
            yield from bench.by_threads()
            yield from bench.cold()


class _JoinBench:
    """Contenders over one cache folder.

    Args:
        folders: of the sets.
        layout: of the teachers.
        num_rounds: that count.
        stack: closes what is opened.
    """

    def __init__(
        self, folders: SetFolders, layout: Layout, num_rounds: int, stack: ExitStack
    ) -> None:
        self._folders = folders
        self._layout = layout
        self._num_rounds = num_rounds
        self._stack = stack
        self._usual_buffer = read_buffer(page_aligned=False)
        self._aligned_buffer = read_buffer(page_aligned=True)
        self._teachers = [stack.enter_context(open_shard_set(path)) for path in folders.teachers]

    def by_teachers(self) -> Iterator[Row | Curve]:
        """Images/s with 1 … 8 teachers, read by the calling thread alone, hot cache."""
        points: list[tuple[float, float]] = []
        for num_teachers in NUM_TEACHERS:
            files = self._folders.tars(num_teachers)
            calls = ReadCalls(self._folders, num_teachers, BATCH, self._stack)
            found = self._alternate(
                {
                    "raw": lambda files=files: read_all(files, self._usual_buffer),
                    "aligned": lambda files=files: read_all(files, self._aligned_buffer),
                    "calls": calls.read,
                    "digests": calls.read_and_digest,
                    "join": self._reading(num_teachers, 0),
                }
            )
            faster = found["raw"].over(found["join"])
            conditions = self._conditions(num_teachers, 0, "hot")
            is_target = num_teachers == 3 and self._layout == "full"
            yield Row.of(
                "against raw read",
                faster,
                "×",
                conditions=conditions,
                target=HOT_TARGET if is_target else None,
                against="readinto of all files into malloc's memory, as a bytearray is",
            )
            yield Row.of(
                "against raw read, page-aligned",
                found["aligned"].over(found["join"]),
                "×",
                conditions=conditions,
                target=HOT_TARGET if is_target else None,
                against="the same into page-aligned memory",
            )
            for name, limit in (("calls", "read calls"), ("digests", "read calls and digests")):
                if self._layout == "full":
                    yield Row.of(
                        f"{limit} alone against raw read, page-aligned",
                        found["aligned"].over(found[name]),
                        "×",
                        conditions=conditions,
                        against="a limit of any join that copies: no order, no checks",
                    )
            yield Row.of(
                "images/s",
                found["join"].rate_of(self._folders.num_records),
                "images/s",
                conditions=conditions,
            )
            points.append((num_teachers, faster.median))
        yield Curve(FIGURE_TEACHERS, "teachers", "× raw read", {self._layout: points})

    def by_threads(self) -> Iterator[Row | Curve]:
        """Images/s of three teachers with reader threads beside the caller, hot cache."""
        found = self._alternate({str(each): self._reading(3, each) for each in NUM_THREADS})
        points: list[tuple[float, float]] = []
        for num_threads in NUM_THREADS:
            rate = found[str(num_threads)].rate_of(self._folders.num_records)
            points.append((num_threads, rate.median))
            if num_threads:
                yield Row.of(
                    "against no reader thread",
                    found["0"].over(found[str(num_threads)]),
                    "×",
                    conditions=self._conditions(3, num_threads, "hot"),
                    against="the calling thread alone",
                )
        yield Curve(
            FIGURE_THREADS, "reader threads beside the caller", "images/s", {self._layout: points}
        )

    def cold(self) -> Iterator[Row]:
        """Three teachers from the disk, the page cache dropped before each round."""
        files = self._folders.tars(3)
        contenders: dict[str, Callable[[], object]] = {
            "raw": lambda: read_all(files, self._aligned_buffer)
        }
        contenders |= {str(each): self._reading(3, each) for each in NUM_THREADS}
        if self._layout == "compact":
            contenders["noise"] = lambda: self._read_beside_noise(files)
        found = self._alternate(contenders, before=lambda: forget_cached_pages(files))
        share = self._needed_bytes(3) / sum(path.stat().st_size for path in files)
        for num_threads in NUM_THREADS:
            faster = found["raw"].over(found[str(num_threads)])
            conditions = self._conditions(3, num_threads, "cold")
            yield Row.of(
                "images/s against raw read",
                faster,
                "×",
                conditions=conditions,
                target=COLD_TARGET,
                against="readinto of all files, cold too",
            )
            yield Row.of(
                "bytes/s against raw read",
                faster.scaled(share),
                "×",
                conditions=conditions,
                target=COLD_TARGET if num_threads == max(NUM_THREADS) else None,
                against="bytes that the join needs against all bytes",
            )

        if self._layout == "compact":
            best = min((found[str(each)] for each in NUM_THREADS), key=lambda each: each.median)
            yield Row.of(
                "of reading and drawing noise alone",
                found["noise"].over(best),
                "×",
                conditions=self._conditions(3, "best", "cold"),
                against="the raw read beside threads that draw the noise, one for each core",
            )

    def _conditions(
        self, num_teachers: int, num_threads: Condition, cache: str
    ) -> dict[str, Condition]:
        return {
            "layout": self._layout,
            "teachers": num_teachers,
            "reader threads": num_threads,
            "cache": cache,
        }

    def _read_beside_noise(self, files: list[Path]) -> None:
        """Do what no join of this layout is spared, and nothing else."""
        side_px, seeds = self._folders.side_px, range(self._folders.num_records)
        with ThreadPoolExecutor(World().num_cores) as pool, ThreadPoolExecutor(1) as disk:
            disk.submit(read_all, files, self._aligned_buffer)
            draws = pool.map(lambda seed: noise(seed, side_px, side_px), seeds)
            assert sum(1 for _ in draws) == self._folders.num_records

    def _needed_bytes(self, num_teachers: int) -> int:
        """Return the bytes of the tensors that a join reads: shared ones once."""
        sizes: dict[str, int] = {}
        for path in self._folders.sets(num_teachers):
            with open_shard_set(path) as shard_set:
                header = shard_set.index(shard_set.manifest.names()[0]).header
            for place in header.places:
                owner = path.name if place.name == "teacher_pred" else "shared"
                sizes[f"{place.name}, {owner}"] = place.num_bytes
        return sum(sizes.values()) * self._folders.num_records

    def _reading(self, num_teachers: int, num_threads: int) -> Callable[[], object]:
        stream = self._stack.enter_context(
            JoinedStream(self._teachers[:num_teachers], global_batch=BATCH, num_threads=num_threads)
        )

        def read_epoch() -> None:
            num_records = sum(len(batch) for batch in stream.epoch(0))
            assert num_records == self._folders.num_records, num_records

        return read_epoch

    def _alternate(
        self,
        contenders: Mapping[str, Callable[[], object]],
        before: Callable[[], object] = lambda: None,
    ) -> dict[str, Sample]:
        def timed(run: Callable[[], object]) -> Callable[[], float]:
            timed_run = seconds(run)

            def after_preparing() -> float:
                before()
                return timed_run()

            return after_preparing

        return alternate({name: timed(run) for name, run in contenders.items()}, self._num_rounds)


if __name__ == "__main__":
    run_alone(measure)
