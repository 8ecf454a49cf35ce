"""A folder of images and captions → what it holds: every image's identity, upright size, caption.

Reads every file that the catalog does not know already, with threads. Bad images are listed
with their reasons; a disk that refuses is an error, never a bad image. Hidden files are left
out, links are followed, and a folder that links lead back to is entered once.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple

from sdxl_distill.catalog.captions import (
    METADATA_NAME,
    caption_name,
    metadata_caption,
    read_caption,
    read_metadata,
)
from sdxl_distill.catalog.catalog import Catalog, KnownFile, KnownFiles
from sdxl_distill.catalog.image import (
    BadImageError,
    GoneImageError,
    read_image_file,
    retry_once,
    upright_size,
)
from sdxl_distill.catalog.image_folder import ImageFolder
from sdxl_distill.core.image_id import image_id
from sdxl_distill.errors import ConfigError, StorageError
from sdxl_distill.storage.regular_file import storage_errors

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp"}
)
# A file changed within one tick of the coarsest clock (FAT: 2 s) may keep its time.
_COARSEST_MTIME_NS: Final = 2_000_000_000
_FILES_IN_FLIGHT: Final = 1024
_NOWHERE: Final = {errno.ENOENT, errno.ELOOP}

Progress = Callable[[int, int], None]


class ScannedImage(NamedTuple):
    """One image file; sizes as `CatalogRow`."""

    image_id: str
    source: str
    num_bytes: int
    mtime_ns: int
    width: int
    height: int
    caption: str


class BadImage(NamedTuple):
    """One image file that cannot become a record, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """What one look at the image folder found.

    Attributes:
        image_dir: the folder.
        started_ns: the start of the scan, nanoseconds since 1970.
        images: the good images, sorted by source.
        bad_images: the bad images, sorted likewise.
        mounts: folders below that lie on another device, relative to the folder.
        metadata_fields: names of all fields in `metadata.jsonl`, sorted.
    """

    image_dir: Path
    started_ns: int
    images: tuple[ScannedImage, ...]
    bad_images: tuple[BadImage, ...]
    mounts: tuple[str, ...] = ()
    metadata_fields: tuple[str, ...] = ()


class _Candidate(NamedTuple):
    """An image file to look at; strings alone, since there may be millions."""

    source: str
    caption_file: str | None
    metadata_caption: str


class _Found(NamedTuple):
    candidates: list[_Candidate]
    mounts: tuple[str, ...]
    metadata_fields: tuple[str, ...]


class _KnownFiles(NamedTuple):
    by_source: KnownFiles
    changed_before_ns: int

    def find(self, source: str, status: os.stat_result) -> KnownFile | None:
        known = self.by_source.find(source)
        same = known is not None and (
            (known.num_bytes, known.mtime_ns) == (status.st_size, status.st_mtime_ns)
        )
        return known if same and status.st_mtime_ns < self.changed_before_ns else None


def scan_folder(
    image_dir: str | Path,
    catalog: Catalog,
    *,
    max_pixels: int,
    max_images: int | None = None,
    on_bad_image: Literal["skip", "error"] = "skip",
    rescan: bool = False,
    num_threads: int = 8,
    progress: Progress | None = None,
) -> Scan:
    """Look at every image below a folder.

    Args:
        image_dir: the folder.
        catalog: the known images; a file with the same source, size and time is not read again.
        max_pixels: the limit above which images are bad.
        max_images: the most that one set can hold; more are refused before any is read.
        on_bad_image: `skip` lists bad images, `error` raises the first in order of sources.
        rescan: True reads all files, known or not.
        num_threads: the number of threads that read and hash.
        progress: a function called with (files done, files in all) after each file.

    Raises:
        ConfigError: when the folder is missing, or has no image, no good one or too many.
        BadImageError: with `on_bad_image: error`.
        CorruptError: when a caption file or `metadata.jsonl` is not what it should be.
        StorageError: when the disk refuses twice, or the folder vanished or lost all its images.
    """
    image_dir = Path(image_dir)
    started_ns = time.time_ns()
    folder = ImageFolder(image_dir)
    candidates, mounts, metadata_fields = _find_again(image_dir, catalog)
    folder.watch(mounts)
    if max_images is not None:
        _require_at_most(max_images, candidates, image_dir)
    by_source = (Catalog() if rescan else catalog).known_files()
    known = _KnownFiles(by_source, catalog.scan_started_ns - _COARSEST_MTIME_NS)
    look = partial(_look, image_dir=image_dir, known=known, max_pixels=max_pixels)
    # Read what is new; one bad image costs itself, a vanished folder ends the scan.
    images, bad_images = list[ScannedImage](), list[BadImage]()
    for num_done, found in enumerate(_map(look, candidates, num_threads), start=1):
        if isinstance(found, ScannedImage):
            images.append(found)
        else:
            if isinstance(found, GoneImageError):
                folder.require_there(found.source)
            if on_bad_image == "error":
                raise found
            bad_images.append(BadImage(found.source, found.reason))
        if progress is not None:
            progress(num_done, len(candidates))
    if not images:
        source, reason = bad_images[0]
        raise ConfigError(
            f"none of the {len(bad_images)} images can be used; {source}: {reason}",
            where=str(image_dir),
            action="check data.image_dir and data.max_image_pixels",
        )
    return Scan(image_dir, started_ns, tuple(images), tuple(bad_images), mounts, metadata_fields)


class ImageCount(NamedTuple):
    """How many image files there are, and how many of them have no caption anywhere."""

    num_images: int
    num_without_caption: int


def count_images(image_dir: str | Path) -> ImageCount:
    """Count the image files below a folder, by their names and `metadata.jsonl` alone.

    Raises:
        ConfigError: when the folder is missing, or has none.
        StorageError: when the disk refuses.
    """
    candidates = _find_candidates(Path(image_dir)).candidates
    without = sum(not each.caption_file and not each.metadata_caption for each in candidates)
    return ImageCount(len(candidates), without)


def _find_again(image_dir: Path, catalog: Catalog) -> _Found:
    """Find candidates; finding none where there were some is a fault of the storage."""
    try:
        return _find_candidates(image_dir)
    except ConfigError as error:
        if not catalog.num_images:
            raise
        raise StorageError(
            f"{error.found}, but the catalog knows {catalog.num_images} images of it",
            expected="the folder that was scanned before",
            where=error.where,
            action="mount it, or put it back; check data.image_dir",
        ) from error


def _require_at_most(max_images: int, candidates: list[_Candidate], image_dir: Path) -> None:
    if len(candidates) > max_images:
        raise ConfigError(
            f"{len(candidates):,} images",
            expected=f"at most {max_images:,}, the shards of one set times their records",
            where=str(image_dir),
            action="raise data.records_per_shard, or lower cache.draws",
        )


def _find_candidates(image_dir: Path) -> _Found:
    if not image_dir.is_dir():
        raise ConfigError(
            "there is no such folder", where=str(image_dir), action="check data.image_dir"
        )
    metadata: dict[str, dict[str, str]] = {}
    metadata_fields: set[str] = set()
    candidates: list[_Candidate] = []
    mounts: list[str] = []
    for folder, names in _walk(image_dir, mounts):
        if METADATA_NAME in names:
            metadata[folder] = retry_once(
                partial(read_metadata, image_dir / folder / METADATA_NAME, metadata_fields)
            )
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                source = f"{folder}/{name}" if folder else name
                caption = metadata_caption(source, metadata) or ""
                candidates.append(_Candidate(source, caption_name(name, names), caption))
    if not candidates:
        raise ConfigError(
            "there is no image in this folder",
            expected=f"files that end in {' '.join(sorted(IMAGE_SUFFIXES))}",
            where=str(image_dir),
            action="check data.image_dir",
        )
    candidates.sort(key=lambda candidate: candidate.source)
    return _Found(candidates, tuple(sorted(mounts)), tuple(sorted(metadata_fields)))


def _walk(image_dir: Path, mounts: list[str]) -> Iterator[tuple[str, set[str]]]:
    """Yield (folder relative to the top, names of its visible files), parents first.

    Folders on another device than the top are added to `mounts`, except those inside another one.
    """
    top_device = None
    entered: set[tuple[int, int]] = set()
    waiting: list[tuple[str, int | None]] = [("", None)]
    while waiting:
        folder, outer_device = waiting.pop()
        path = image_dir / folder
        with storage_errors(path):
            status = path.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
        top_device = status.st_dev if top_device is None else top_device
        if status.st_dev not in (top_device, outer_device):
            mounts.append(folder)
        folders, files = retry_once(partial(_list, path))
        yield folder, files
        inner = (f"{folder}/{name}" if folder else name for name in folders)
        waiting.extend((name, status.st_dev) for name in sorted(inner, reverse=True))


def _list(path: Path) -> tuple[set[str], set[str]]:
    folders: set[str] = set()
    files: set[str] = set()
    with storage_errors(path), os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if _is_folder(entry) else files).add(entry.name)
    return folders, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself: opening it will say so
            return False
        raise


def _map(
    look: Callable[[_Candidate], ScannedImage | BadImageError],
    candidates: list[_Candidate],
    num_threads: int,
) -> Iterator[ScannedImage | BadImageError]:
    with ThreadPoolExecutor(num_threads, thread_name_prefix="scan") as pool:
        # A future for every file of a million would take a gigabyte.
        for start in range(0, len(candidates), _FILES_IN_FLIGHT):
            yield from pool.map(look, candidates[start : start + _FILES_IN_FLIGHT])


def _look(
    candidate: _Candidate, image_dir: Path, known: _KnownFiles, max_pixels: int
) -> ScannedImage | BadImageError:
    source, path = candidate.source, image_dir / candidate.source
    try:
        _require_utf8(source)
        # Before reading: a file that changes meanwhile shows another time at the next scan.
        status = retry_once(partial(_status, path, source))
        found = known.find(source, status)
        if found is None:
            content = read_image_file(path, source)
            size = upright_size(content, source, max_pixels)
            found = KnownFile(image_id(content), len(content), status.st_mtime_ns, *size)
    except BadImageError as error:
        return error
    caption = candidate.metadata_caption
    if candidate.caption_file is not None:
        caption = retry_once(partial(read_caption, path.with_name(candidate.caption_file)))
    return ScannedImage(
        found.image_id,
        source,
        found.num_bytes,
        found.mtime_ns,
        found.width,
        found.height,
        caption,
    )


def _require_utf8(source: str) -> None:
    printable = source.encode(errors="backslashreplace").decode()
    if printable != source:
        raise BadImageError("its name is not UTF-8", where=printable, action="rename it")


def _status(path: Path, source: str) -> os.stat_result:
    with storage_errors(path):
        try:
            return path.stat()
        except OSError as error:
            if error.errno in _NOWHERE:
                raise GoneImageError(
                    "is gone, or a link that leads nowhere", where=source
                ) from error
            raise
