"""Open files share descriptors: never more than allowed, always the right bytes."""

from __future__ import annotations

import errno
import gc
import os
import random
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from sdxl_distill.errors import CorruptError, StorageError
from sdxl_distill.storage.open_file import OpenFile, OpenFiles, raise_limit


def opener(path: Path) -> Callable[[], int]:
    return lambda: os.open(path, os.O_RDONLY)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    made = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(made):
        path.write_bytes(bytes([number]) * 100)
    return made


def opened(paths: list[Path], files: OpenFiles) -> list[OpenFile]:
    return [OpenFile(opener(path), str(path), files) for path in paths]


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def first_byte(file: OpenFile) -> int:
    buffer = bytearray(1)
    assert file.read_into([memoryview(buffer)], 50) == 1
    return buffer[0]


def test_no_more_files_are_open_than_allowed_and_each_is_read(paths: list[Path]) -> None:
    gc.collect()  # what earlier tests left
    before = num_open()
    files = opened(paths, OpenFiles(most_open=3))
    for _ in range(3):
        for number in random.Random(1).sample(range(20), 20):
            assert first_byte(files[number]) == number
            assert num_open() <= before + 3
    del files
    gc.collect()
    assert num_open() == before


def test_threads_that_take_descriptors_from_each_other_read_the_right_bytes(
    paths: list[Path],
) -> None:
    files = opened(paths, OpenFiles(most_open=2))
    order = [random.Random(2).randrange(20) for _ in range(4000)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: first_byte(files[number]), order)) == order


def test_what_was_read_lately_stays_open(paths: list[Path]) -> None:
    opens: list[Path] = []

    def counted(path: Path) -> Callable[[], int]:
        def open_it() -> int:
            opens.append(path)
            return os.open(path, os.O_RDONLY)

        return open_it

    shared = OpenFiles(most_open=4)
    files = [OpenFile(counted(path), str(path), shared) for path in paths]
    for file in files:
        first_byte(files[0])
        first_byte(file)
    assert opens.count(paths[0]) <= 3


def test_files_are_closed_where_descriptors_have_run_out(paths: list[Path]) -> None:
    shared = OpenFiles(most_open=100)
    files = opened(paths, shared)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE,
        (max(int(each.name) for each in Path("/proc/self/fd").iterdir()), hard),
    )
    others: list[int] = []
    try:
        with suppress(OSError):
            while True:
                others.append(os.open(paths[0], os.O_RDONLY))
        more = opened(paths, shared)
        assert [first_byte(file) for file in [*files, *more]] == [*range(20), *range(20)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in others:
            os.close(descriptor)


def test_a_process_without_a_descriptor_is_told_which_limit_to_raise(paths: list[Path]) -> None:
    def refuse() -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(paths[0]))

    with pytest.raises(StorageError, match="ulimit -n") as caught:
        OpenFile(refuse, "x", OpenFiles(most_open=5))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert f"may open {limit}" in caught.value.found
    assert str(caught.value.expected) == f"at least {limit + 512}"


def test_a_file_that_changed_its_size_or_vanished_meanwhile_is_corrupt(paths: list[Path]) -> None:
    files = opened(paths, OpenFiles(most_open=1))
    paths[0].write_bytes(b"short")
    paths[1].unlink()
    for file, message in zip(files, ("5 bytes", "missing"), strict=False):
        with pytest.raises(CorruptError, match=message):
            first_byte(file)


def test_the_limit_is_raised_as_far_as_it_may_be() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert raise_limit(300) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 300
        assert raise_limit(200) == 300
        assert raise_limit(1 << 40) == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
