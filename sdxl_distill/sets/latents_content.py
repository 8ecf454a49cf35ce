"""What a latents set holds: each catalogued image, decoded, cropped to its bucket and encoded.

Decoding and resizing run in threads ahead of the VAE. An image that does not decode, or is no
longer the one that was scanned, is left out of its shard; the manifest lists it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.builder.set_builder import EncodedRecord
from sdxl_distill.catalog.image import (
    BadImageError,
    GoneImageError,
    fit_to_bucket,
    read_image,
    read_image_file,
)
from sdxl_distill.catalog.image_folder import ImageFolder, all_gone
from sdxl_distill.catalog.segment import CatalogRow
from sdxl_distill.core.image_id import image_id
from sdxl_distill.core.micro_conditioning import time_ids
from sdxl_distill.fingerprint import canonical_json
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.latents_plan import LatentsPlan
from sdxl_distill.shards.record import RecordHeader

IMAGE_PIPELINE: Final = "cover-lanczos-1"
"""The name of decoding, resize and crop in the fingerprint; other ones give other latents."""

_log = logging.getLogger(__name__)


class PixelBatch(NamedTuple):
    """Decoded images of one bucket: rows of the catalog and uint8 [B, H, W, 3]."""

    rows: list[CatalogRow]
    pixels: torch.Tensor


class LatentBatch(NamedTuple):
    """The same images encoded: scaled latents, float16 [B, C, H/8, W/8] on the CPU."""

    rows: list[CatalogRow]
    latents: torch.Tensor


@dataclass(frozen=True)
class ImageReader:
    """Reads and decodes the images of a catalog.

    Attributes:
        folder: the image folder that was scanned.
        max_pixels: the most pixels that an image may have; larger images are bad.
        on_bad_image: the action on a bad image: `skip` leaves it out, `error` raises its error.
    """

    folder: ImageFolder
    max_pixels: int
    on_bad_image: Literal["skip", "error"]

    def read(self, row: CatalogRow) -> npt.NDArray[np.uint8] | BadImageError:
        """Return pixels in the row's bucket, uint8 [H, W, 3]; the error of an image left out.

        Raises:
            BadImageError: with `on_bad_image: error`.
            StorageError: when the disk refuses or the folder is gone, which is not the image's
                fault.
        """
        try:
            content = read_image_file(self.folder.path / row.source, row.source)
            if image_id(content) != row.image_id:
                raise BadImageError(
                    "changed since the scan",
                    expected="the bytes that the catalog knows",
                    where=row.source,
                    action="run build_latents again: the new bytes become an image of their own",
                )
            pixels = read_image(content, row.source, self.max_pixels).pixels
        except BadImageError as error:
            if isinstance(error, GoneImageError):
                self.folder.require_there(row.source)
            if self.on_bad_image == "error":
                raise
            _log.warning("left out: %s", error)
            return error
        return fit_to_bucket(pixels, row.bucket)


def planned_shards(plan: LatentsPlan) -> list[PlannedShard]:
    """Return every shard of the catalog, each with the digest of its images as its source."""
    return [
        PlannedShard(name, plan.num_rows(name), plan.source_sha256(name)) for name in plan.names
    ]


class LatentsContent:
    """Content of the latents set, for `set_builder.build_shards`.

    Args:
        plan: the images of each shard.
        images: the source of their pixels.
        encode_images: the VAE: uint8 [B, H, W, 3] → scaled latents float16 [B, C, H/8, W/8].
        batch_size: the number of images that are encoded at once.
        num_threads: the number of threads that decode.
    """

    def __init__(
        self,
        plan: LatentsPlan,
        images: ImageReader,
        encode_images: Callable[[torch.Tensor], torch.Tensor],
        batch_size: int,
        num_threads: int,
    ) -> None:
        self._plan = plan
        self._images = images
        self._encode_images = encode_images
        self._batch_size = batch_size
        self._num_threads = num_threads

    def accepts(self, index: ShardIndex) -> bool:
        """As `LatentsPlan.accepts`."""
        return self._plan.accepts(index)

    def read(self, shard: PlannedShard) -> Iterator[PixelBatch]:
        """Yield the shard's images that decode, in the order of their keys.

        Raises:
            StorageError: when none of them exists; nothing of the shard is committed then.
        """
        rows, num_gone = self._plan.rows(shard.name), 0
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode") as pool:
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                decoded = list(zip(batch, pool.map(self._images.read, batch), strict=True))
                good = [(row, pixels) for row, pixels in decoded if isinstance(pixels, np.ndarray)]
                num_gone += sum(isinstance(pixels, GoneImageError) for _, pixels in decoded)
                if good:
                    pixels = torch.from_numpy(np.stack([pixels for _, pixels in good]))
                    yield PixelBatch([row for row, _ in good], pixels)
        if num_gone == len(rows):
            raise all_gone(num_gone, f"{self._images.folder.path}, {shard.name}")

    def compute(self, batch: PixelBatch) -> LatentBatch:
        """Encode one batch."""
        return LatentBatch(batch.rows, self._encode_images(batch.pixels).cpu())

    def encode(self, result: LatentBatch, header: RecordHeader) -> Iterator[EncodedRecord]:
        """Yield each image's record, and next to it what no tensor says."""
        sizes = [time_ids(row.width, row.height, row.crop, row.bucket) for row in result.rows]
        tensors = {"latents": result.latents, "time_ids": np.stack(sizes)}
        for row, record in zip(result.rows, header.encode_batch(tensors), strict=True):
            yield EncodedRecord(row.key, record, sidecar_of(row))


def sidecar_of(row: CatalogRow) -> bytes:
    """Return the JSON next to an image's record: what no tensor says."""
    fields: dict[str, Any] = {
        "captions": list(row.captions),
        "crop": row.crop._asdict(),
        "original_height": row.height,
        "original_width": row.width,
        "source": row.source,
        "subset": row.subset,
    }
    return canonical_json(fields)
