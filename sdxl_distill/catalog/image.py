"""Bytes of an image file → upright RGB pixels → the crop of a bucket.

Formats are recognised by their first bytes and opened by one Pillow class each, never by
Pillow's own list of plugins. Size and frames are checked in the header, before any pixel is
decoded. Colour profiles are not applied; every pixel becomes 8 bits.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from sdxl_distill.core.bucket import Bucket, cover_crop
from sdxl_distill.errors import CorruptError, StorageError
from sdxl_distill.storage import regular_file

MAX_FILE_BYTES: Final = 1 << 30
MAX_SIDE_PX: Final = 65_535  # JPEG's limit; keeps sizes after the cover-resize within int32
WHITE: Final = (255, 255, 255)

_RETRY_PAUSE_SECONDS: Final = 0.2
_PLUGINS: Final[tuple[tuple[bytes, type[ImageFile]], ...]] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"II*\0", TiffImageFile),
    (b"MM\0*", TiffImageFile),
    (b"II+\0", TiffImageFile),
    (b"MM\0+", TiffImageFile),
    (b"BM", BmpImageFile),
)
# What Pillow raises on damaged bytes; its plugins check little before they index and unpack.
_DECODER_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# A PNG may carry its orientation after the pixels; without one of these it has none.
_PNG_ORIENTATION_MARKS: Final = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_SIDEWAYS_ORIENTATIONS: Final = (5, 6, 7, 8)
_WHITE_IS_ZERO: Final = 0
_BITS_PER_SAMPLE_TAG: Final = 258
_PHOTOMETRIC_TAG: Final = 262

_T = TypeVar("_T")


class BadImageError(CorruptError):
    """An image file that cannot become a record: damaged, animated, too large, unknown."""

    @property
    def source(self) -> str:
        """The image's path."""
        return self.where or ""

    @property
    def reason(self) -> str:
        """What is wrong with it, as a phrase."""
        return self.found


class GoneImageError(BadImageError):
    """An image file that is not there; its folder may be missing too."""


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An upright image: `pixels` uint8 [H, W, 3], RGB."""

    pixels: npt.NDArray[np.uint8]

    @property
    def width(self) -> int:
        """Width in pixels, as displayed."""
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        """Height in pixels, as displayed."""
        return self.pixels.shape[0]


def retry_once(read: Callable[[], _T]) -> _T:
    """Call `read`, and once more after a pause when the storage refuses the first time."""
    try:
        return read()
    except StorageError:
        time.sleep(_RETRY_PAUSE_SECONDS)
        return read()


def read_image_file(path: Path, where: str) -> bytes:
    """Read an image file's bytes.

    Args:
        path: the file.
        where: the image's name in errors.

    Raises:
        GoneImageError: when it is not there.
        BadImageError: when it is not a regular file or larger than `MAX_FILE_BYTES`.
        StorageError: when the disk refuses twice; that says nothing about the image.
    """
    try:
        return retry_once(lambda: regular_file.read_bytes(path, MAX_FILE_BYTES))
    except FileNotFoundError as error:
        raise GoneImageError("is gone, or a link that leads nowhere", where=where) from error
    except CorruptError as error:
        raise BadImageError(error.found, expected=error.expected, where=where) from error


def upright_size(content: bytes, where: str, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) in pixels after EXIF rotation, from the header where possible.

    Raises:
        BadImageError: as `read_image`, as far as the header tells.
    """
    with _decoding(where):
        image = _open(content, where, max_pixels)
        if isinstance(image, TiffImageFile):  # its size already is that of the upright image
            return image.size
        if isinstance(image, PngImageFile) and not any(
            mark in content for mark in _PNG_ORIENTATION_MARKS
        ):
            return image.size
        width, height = image.size
        sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS_ORIENTATIONS
        return (height, width) if sideways else (width, height)


def read_image(
    content: bytes, where: str, max_pixels: int, background: tuple[int, int, int] = WHITE
) -> DecodedImage:
    """Decode the bytes of a JPEG, PNG, WebP, TIFF or BMP file.

    The EXIF orientation is applied, transparency is laid over `background`, 16-bit samples
    keep their high byte, grey, palette and CMYK become RGB.

    Args:
        content: the whole file.
        where: the image's name in errors.
        max_pixels: the limit above which an image is refused before it is decoded.
        background: the colour behind transparency: RGB, 0…255.

    Raises:
        BadImageError: empty, of another format, damaged, cut short, animated or of several
            pages, larger than `max_pixels`, or of pixels without a defined white (32 bits).
    """
    with _decoding(where):
        image: Image.Image = _open(content, where, max_pixels)
        ImageOps.exif_transpose(image, in_place=True)
        # Samples of 8 bits.
        if image.mode in {"I", "F"}:
            raise BadImageError(
                f"{image.mode} pixels of 32 bits or with a sign",
                expected="8 or 16 bits without a sign, so that white is defined",
                where=where,
            )
        _scale_color_key(image, content)
        if image.mode.startswith("I;16"):
            image = _high_byte(image)
        # Opaque RGB.
        if image.has_transparency_data:
            backdrop = Image.new("RGBA", image.size, (*background, 255))
            image = Image.alpha_composite(backdrop, image.convert("RGBA"))
        return DecodedImage(np.array(image.convert("RGB")))


def fit_to_bucket(pixels: npt.NDArray[np.uint8], bucket: Bucket) -> npt.NDArray[np.uint8]:
    """Cover-resize (Lanczos, antialiased) and centre-crop to uint8 [bucket h, bucket w, 3].

    Only the part inside the crop is computed: an image of 1 x 65,535 pixels would become
    17 gigapixels on the way otherwise.

    Args:
        pixels: upright RGB, uint8 [H, W, 3].
        bucket: the target size.
    """
    height, width = pixels.shape[:2]
    crop = cover_crop(width, height, bucket)
    x_scale, y_scale = width / crop.resized_width, height / crop.resized_height
    source_box = (
        crop.left * x_scale,
        crop.top * y_scale,
        min((crop.left + bucket.width) * x_scale, width),
        min((crop.top + bucket.height) * y_scale, height),
    )
    size = (bucket.width, bucket.height)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, box=source_box))


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    try:
        yield
    except _DECODER_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise BadImageError(f"cannot be decoded: {reason}", where=where) from error


def _open(content: bytes, where: str, max_pixels: int) -> ImageFile:
    if not content:
        raise BadImageError("is empty", where=where)
    plugin = next((plugin for magic, plugin in _PLUGINS if content.startswith(magic)), None)
    if plugin is None:
        raise BadImageError(
            f"begins with {content[:8].hex(' ')}",
            expected="a JPEG, PNG, WebP, TIFF or BMP file",
            where=where,
        )
    image = plugin(BytesIO(content))
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE_PX:
        raise BadImageError(
            f"{width} x {height} pixels",
            expected=f"at most {max_pixels} pixels and {MAX_SIDE_PX} a side",
            where=where,
            action="make it smaller, or raise data.max_image_pixels",
        )
    if isinstance(image, PngImageFile | WebPImageFile | TiffImageFile) and image.n_frames > 1:
        raise BadImageError(
            f"is animated or has pages: {image.n_frames} of them", expected="one", where=where
        )
    return image


def _high_byte(image: Image.Image) -> Image.Image:
    """Turn grey of 12 or 16 bits into mode L; Pillow's own conversion clips at 255."""
    samples = np.asarray(image).astype(np.uint16)
    num_bits = 16
    if isinstance(image, TiffImageFile):
        num_bits = image.tag_v2[_BITS_PER_SAMPLE_TAG][0]
        if image.tag_v2.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
            samples = (1 << num_bits) - 1 - samples
    grey = Image.fromarray((samples >> (num_bits - 8)).astype(np.uint8))
    grey.info = image.info
    return grey


def _scale_color_key(image: Image.Image, content: bytes) -> None:
    """Give the transparent colour of a PNG the scale that Pillow gave its pixels.

    Pillow keeps the number from the file, whose samples may have 2, 4 or 16 bits.
    """
    key = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or image.mode in {"1", "P"} or key is None:
        return
    depth = content[24]  # in IHDR, which is always first

    def scaled(sample: int) -> int:
        return sample >> 8 if depth == 16 else sample * 255 // ((1 << depth) - 1)

    image.info["transparency"] = (
        tuple(scaled(sample) for sample in key) if isinstance(key, tuple) else scaled(key)
    )
