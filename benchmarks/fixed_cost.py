"""What is paid however much there is to do: starting a command, and looking at what is complete."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from measuring.many_records import ManyRecords
from measuring.rounds import alternate, seconds
from measuring.row import Curve, Row
from measuring.scratch import read_all, read_buffer, scratch_folder
from measuring.script import run_alone
from measuring.sets import write_sets
from measuring.tiny_job import TinyJob

from sdxl_distill.core.noise import noise
from sdxl_distill.demo.family import one_thread
from sdxl_distill.runtime.world import World
from sdxl_distill.verify.whole_set import verify_set

ROOT: Final = Path(__file__).parents[1]
START_SECONDS: Final = 0.5
DONE_SECONDS: Final = 3.0
QUICK_SECONDS: Final = 2.0
VERIFY_TARGET: Final = 0.5
NUM_CORES: Final = World().num_cores


def measure(small: bool) -> Iterator[Row | Curve]:
    """Start commands; build and verify what is complete; verify every byte against a raw read."""
    yield from _starting(1 if small else 5)
    with scratch_folder() as folder, one_thread():
        yield from _complete_set(folder, 512 if small else 100_000, 1 if small else 5)
    with scratch_folder() as folder:
        yield from _full_verification(folder, small)


def _starting(num_rounds: int) -> Iterator[Row]:
    commands = {
        "import sdxl_distill": ["-c", "import sdxl_distill"],
        "sdxl-distill --help": ["-m", "sdxl_distill", "--help"],
        "train.py --help": [str(ROOT / "train.py"), "--help"],
        "build_shards.py --help": [str(ROOT / "tools/build_shards.py"), "--help"],
        "verify_shards.py --help": [str(ROOT / "tools/verify_shards.py"), "--help"],
    }
    found = alternate(
        {name: seconds(lambda words=words: _python(*words)) for name, words in commands.items()},
        num_rounds,
    )
    for name, sample in found.items():
        yield Row.of(
            name, sample, "s", better="lower", target=START_SECONDS, against="a process of its own"
        )


def _complete_set(folder: Path, num_records: int, num_rounds: int) -> Iterator[Row]:
    job = TinyJob(folder, side_px=64, records_per_shard=512)
    job.prepare(num_images=0)
    path = ManyRecords(job, num_records).build()
    config_file = folder / "builder.json"
    config_file.write_text(job.builder().model_dump_json())
    build = str(ROOT / "tools/build_shards.py"), "--config", str(config_file)
    verify = str(ROOT / "tools/verify_shards.py"), "--cache-dir", str(path), "--quick"
    found = alternate(
        {
            "build": seconds(lambda: job.build_predictions(job.builder())),
            "build command": seconds(lambda: _python(*build)),
            "verify": seconds(lambda: verify_set(path, quick=True, num_threads=NUM_CORES)),
            "verify command": seconds(lambda: _python(*verify)),
        },
        num_rounds,
    )
    done, quick = f"builder that finds {num_records:,} records done", "verify --quick of as many"
    for name, metric, target, against in (
        ("build", done, DONE_SECONDS, "the builder's own work"),
        ("build command", f"{done}, command", DONE_SECONDS, "with the imports it needs"),
        ("verify", quick, QUICK_SECONDS, "the verifier's own work"),
        ("verify command", f"{quick}, command", QUICK_SECONDS, "with the import of torch"),
    ):
        yield Row.of(metric, found[name], "s", better="lower", target=target, against=against)


def _full_verification(folder: Path, small: bool) -> Iterator[Row]:
    side_px, records_per_shard = (128 if small else 1024), 16
    sets = write_sets(
        folder,
        num_records=16 if small else 400,
        num_teachers=1,
        side_px=side_px,
        records_per_shard=records_per_shard,
    )
    files = sets.tars(1)[-(len(sets.tars(1)) // 2) :]  # the teacher's

    buffer = read_buffer(page_aligned=True)

    def verify() -> None:
        verification = verify_set(sets.teachers[0], num_threads=NUM_CORES)
        assert not verification.findings, verification.findings

    def necessary_work(number_and_file: tuple[int, Path]) -> None:
        number, file = number_and_file
        hashlib.sha256(file.read_bytes())
        for record in range(records_per_shard):
            noise(number * records_per_shard + record, side_px, side_px)

    def do_necessary_work() -> None:
        with ThreadPoolExecutor(NUM_CORES) as pool:
            list(pool.map(necessary_work, enumerate(files)))

    found = alternate(
        {
            "raw": seconds(lambda: read_all(files, buffer)),
            "necessary": seconds(do_necessary_work),
            "verify": seconds(verify),
        },
        1 if small else 7,
    )
    yield Row.of(
        "full verification",
        found["raw"].over(found["verify"]),
        "×",
        target=VERIFY_TARGET,
        against=f"readinto of the same tars, hot cache; threads: {NUM_CORES}",
    )
    yield Row.of(
        "full verification, of the least that it must do",
        found["necessary"].over(found["verify"]),
        "×",
        against="SHA-256 of the tars and the noise of every seed, as many threads, nothing else",
    )
    yield Row.of(
        "the least that it must do",
        found["raw"].over(found["necessary"]),
        "×",
        against="the same raw read: no verification can be faster",
    )


def _python(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, capture_output=True, env=environment)


if __name__ == "__main__":
    run_alone(measure)
