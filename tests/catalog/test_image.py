"""Decoding: every sort of image a folder may hold, good and bad."""

from __future__ import annotations

import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from sdxl_distill.catalog.image import (
    MAX_SIDE_PX,
    BadImageError,
    fit_to_bucket,
    read_image,
    read_image_file,
    upright_size,
)
from sdxl_distill.core.bucket import SDXL_BUCKETS, Bucket, cover_crop
from sdxl_distill.errors import StorageError

if TYPE_CHECKING:
    from tests.catalog.conftest import BuildPng, EncodeImage

MAX_PIXELS = 1_000_000
# Where row 0 and column 0 of the stored pixels belong (Exif 2.32, tag 0x0112), as the array
# operation that stores an upright image that way.
STORED_BY_ORIENTATION: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


def photo(width: int = 40, height: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decode(content: bytes) -> np.ndarray:
    return read_image(content, "folder/x.png", MAX_PIXELS).pixels


def orientation_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def tiff(width: int, height: int, depth: int, photometric: int, strip: bytes) -> bytes:
    """A little-endian grey TIFF of one strip."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, depth), (259, 3, 1)]
    tags += [(262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, height)]
    tags += [(279, 4, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + directory


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "BMP"])
def test_lossless_formats_decode_exactly(encode_image: EncodeImage, image_format: str) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    pixels = photo()
    assert np.array_equal(decode(encode_image(pixels, image_format, **options)), pixels)


def test_a_jpeg_decodes_as_pillow_does(encode_image: EncodeImage) -> None:
    content = encode_image(photo(), "JPEG")
    expected = np.asarray(Image.open(BytesIO(content)))
    assert np.array_equal(decode(content), expected)


@pytest.mark.parametrize("orientation", STORED_BY_ORIENTATION)
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_every_exif_orientation_comes_out_upright(
    encode_image: EncodeImage, image_format: str, orientation: int
) -> None:
    upright = np.kron(photo(5, 3), np.ones((8, 8, 1), np.uint8))  # blocks survive JPEG
    stored = np.ascontiguousarray(STORED_BY_ORIENTATION[orientation](upright))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    content = encode_image(
        stored, image_format, exif=orientation_exif(orientation), **options.get(image_format, {})
    )
    pixels = decode(content)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= (3 if image_format == "JPEG" else 0)
    assert upright_size(content, "x", MAX_PIXELS) == (40, 24)


def test_an_orientation_behind_the_pixels_of_a_png_is_seen_by_the_scan(build_png: BuildPng) -> None:
    exif = orientation_exif(6).removeprefix(b"Exif\0\0")
    content = build_png(2, 1, 8, 0, b"\0\x10\x20", behind=((b"eXIf", exif),))
    assert upright_size(content, "x", MAX_PIXELS) == (1, 2)
    assert decode(content)[:, 0, 0].tolist() == [0x10, 0x20]


def test_grey_of_16_bits_keeps_its_scale_in_png_and_tiff(encode_image: EncodeImage) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for image_format in ("PNG", "TIFF"):
        pixels = decode(encode_image(ramp, image_format))
        assert np.abs(pixels[..., 0] - ramp / 257).max() <= 1
        assert pixels.min() == 0 and pixels.max() == 255


def test_rgb_of_16_bits_keeps_its_scale(build_png: BuildPng) -> None:
    row = struct.pack(">6H", 0, 0x8000, 0xFFFF, 0xFFFF, 0x1234, 0)
    assert decode(build_png(2, 1, 16, 2, b"\0" + row)).tolist() == [
        [[0, 0x80, 255], [255, 0x12, 0]]
    ]


def test_8_bit_grey_widened_to_16_bits_comes_back(encode_image: EncodeImage) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for widened in (grey * 257, grey << 8):
        assert np.array_equal(decode(encode_image(widened, "PNG"))[..., 0], grey)


def test_a_tiff_with_white_as_zero_is_inverted() -> None:
    content = tiff(3, 1, 16, 0, struct.pack("<3H", 0, 0x8000, 0xFFFF))
    assert decode(content)[0, :, 0].tolist() == [255, 127, 0]


def test_a_tiff_of_12_bits_reaches_white() -> None:
    content = tiff(2, 1, 12, 1, bytes([0xFF, 0xF0, 0x00]))
    assert decode(content)[0, :, 0].tolist() == [255, 0]


def test_cmyk_becomes_rgb() -> None:
    pixels = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(file, "JPEG", quality=100)
    assert np.abs(decode(file.getvalue()).astype(int) - pixels).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode: str) -> None:
    image = Image.fromarray(photo()).convert(mode)
    file = BytesIO()
    image.save(file, "PNG")
    assert np.array_equal(decode(file.getvalue()), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_show_the_background_not_their_hidden_color(
    encode_image: EncodeImage, image_format: str
) -> None:
    pixels = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    content = encode_image(pixels, image_format, **options)
    assert decode(content).tolist() == [[[255, 255, 255], [255, 0, 0], [127, 127, 127]]]
    black = read_image(content, "x", MAX_PIXELS, background=(0, 0, 0)).pixels
    assert black[0, 0].tolist() == [0, 0, 0]


def test_a_transparent_palette_entry_shows_the_background() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    file = BytesIO()
    image.save(file, "PNG", transparency=0)
    assert decode(file.getvalue()).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize(
    ("depth", "color_type", "row", "key"),
    [
        (2, 0, bytes([0b10_01_0000]), struct.pack(">H", 0b10)),
        (4, 0, bytes([0x51]), struct.pack(">H", 5)),
        (16, 0, struct.pack(">2H", 0x1234, 0x5678), struct.pack(">H", 0x1234)),
        (16, 2, struct.pack(">6H", 0x1234, 0, 7, 9, 9, 0), struct.pack(">3H", 0x1234, 0, 7)),
    ],
)
def test_the_transparent_color_of_a_png_is_found_at_every_depth(
    build_png: BuildPng, depth: int, color_type: int, row: bytes, key: bytes
) -> None:
    pixels = decode(build_png(2, 1, depth, color_type, b"\0" + row, (b"tRNS", key)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() != [255, 255, 255]


def test_bytes_count_not_the_name(encode_image: EncodeImage) -> None:
    pixels = photo()
    assert np.array_equal(read_image(encode_image(pixels, "PNG"), "a.jpg", 10**6).pixels, pixels)


@pytest.mark.parametrize("look", [read_image, upright_size])
def test_an_empty_file_is_a_bad_image(look: Callable[..., object]) -> None:
    with pytest.raises(BadImageError) as caught:
        look(b"", "folder/empty.png", MAX_PIXELS)
    assert (caught.value.source, caught.value.reason) == ("folder/empty.png", "is empty")


@pytest.mark.parametrize("image_format", ["GIF", "PPM", "ICO", "TGA", "PDF", "EPS"])
def test_other_formats_are_refused_whatever_their_name(
    encode_image: EncodeImage, image_format: str
) -> None:
    with pytest.raises(BadImageError, match="JPEG, PNG, WebP, TIFF or BMP"):
        decode(encode_image(photo(), image_format))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("look", [read_image, upright_size])
def test_animations_and_pages_are_refused(look: Callable[..., object], image_format: str) -> None:
    frames = [Image.fromarray(photo(seed=seed)) for seed in range(3)]
    file = BytesIO()
    frames[0].save(file, image_format, save_all=True, append_images=frames[1:])
    with pytest.raises(BadImageError, match="animated or has pages: 3"):
        look(file.getvalue(), "x", MAX_PIXELS)


def test_an_animated_gif_named_png_is_refused() -> None:
    frames = [Image.fromarray(photo(seed=seed)) for seed in range(3)]
    file = BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(BadImageError, match="begins with 47 49 46 38"):
        decode(file.getvalue())


@pytest.mark.parametrize("look", [read_image, upright_size])
def test_a_bomb_is_refused_by_its_header_alone(
    build_png: BuildPng, look: Callable[..., object]
) -> None:
    bomb = build_png(30_000, 30_000, 8, 2, b"nothing to decode here")
    with pytest.raises(BadImageError, match="30000 x 30000 pixels"):
        look(bomb, "x", MAX_PIXELS)


def test_a_webp_canvas_is_refused_before_its_memory_is_taken(encode_image: EncodeImage) -> None:
    content = bytearray(encode_image(np.zeros((8, 8, 4), np.uint8), "WEBP"))
    assert content[12:16] == b"VP8X"
    content[24:30] = (0xFFFF).to_bytes(3, "little") * 2  # canvas of 65,536 x 65,536
    with pytest.raises(BadImageError):
        upright_size(bytes(content), "x", MAX_PIXELS)


def test_a_long_thin_image_is_refused(build_png: BuildPng) -> None:
    content = build_png(MAX_SIDE_PX + 1, 1, 8, 0, bytes(MAX_SIDE_PX + 2))
    with pytest.raises(BadImageError, match=f"{MAX_SIDE_PX} a side"):
        upright_size(content, "x", MAX_PIXELS)


@pytest.mark.parametrize("values", [np.int32, np.float32])
def test_pixels_without_a_defined_white_are_refused(
    encode_image: EncodeImage, values: type[np.generic]
) -> None:
    with pytest.raises(BadImageError, match="so that white is defined"):
        decode(encode_image(np.ones((4, 4), values), "TIFF"))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it then raises
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_an_image_cut_short_anywhere_is_refused(
    encode_image: EncodeImage, image_format: str
) -> None:
    content = encode_image(photo(), image_format)
    # The last bytes of a PNG (IEND) and a JPEG (EOI) hold no pixel.
    for size in range(1, len(content) - 12, max(1, len(content) // 60)):
        with pytest.raises(BadImageError):
            decode(content[:size])


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it then raises or survives
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_damage_raises_nothing_but_bad_image_and_the_scan_agrees_with_the_decoder(
    encode_image: EncodeImage, image_format: str
) -> None:
    generator = np.random.default_rng(0)
    content = encode_image(photo(), image_format, exif=orientation_exif(6))
    if image_format == "BMP":
        content = encode_image(photo(), image_format)
    num_refused = 0
    for trial in range(300):
        damaged = bytearray(content)
        reach = len(damaged) if trial % 2 else min(len(damaged), 200)
        for position in generator.integers(reach, size=1 + trial % 3):
            damaged[position] = generator.integers(256)
        try:
            size = upright_size(bytes(damaged), "x", MAX_PIXELS)
            image = read_image(bytes(damaged), "x", MAX_PIXELS)
        except BadImageError:
            num_refused += 1
        else:
            assert size == (image.width, image.height)
    assert num_refused > 0


def test_a_missing_file_is_a_bad_image(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="is gone"):
        read_image_file(tmp_path / "x.png", "x.png")


def test_a_disk_that_refuses_is_no_bad_image() -> None:
    unreadable = Path("/proc/self/mem")  # regular, and EIO at byte 0
    with pytest.raises(StorageError):
        read_image_file(unreadable, "x.png")


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 9), data=st.data()
)
def test_fitting_equals_a_whole_resize_and_a_crop(
    width: int, height: int, seed: int, data: st.DataObject
) -> None:
    bucket = Bucket(data.draw(st.sampled_from([64, 96, 128])), data.draw(st.sampled_from([64, 96])))
    # Pillow clips between its two passes, whose order it chooses by cost: stay off 0 and 255.
    pixels = photo(width, height, seed) // 4 + 96
    crop = cover_crop(width, height, bucket)
    if crop.resized_width * crop.resized_height > 4_000_000:
        return
    whole = Image.fromarray(pixels).resize(crop[:2], Image.Resampling.LANCZOS)
    corner = (crop.left, crop.top)
    expected = whole.crop((*corner, crop.left + bucket.width, crop.top + bucket.height))
    fitted = fit_to_bucket(pixels, bucket)
    assert fitted.shape == (bucket.height, bucket.width, 3) and fitted.dtype == np.uint8
    assert np.abs(fitted.astype(int) - np.asarray(expected)).max() <= 2


def test_an_image_of_the_buckets_size_passes_unchanged() -> None:
    pixels = photo(128, 96)
    assert np.array_equal(fit_to_bucket(pixels, Bucket(128, 96)), pixels)


def test_shrinking_is_antialiased() -> None:
    checkerboard = np.indices((512, 512)).sum(axis=0) % 2 * 255
    pixels = np.repeat(checkerboard[..., None], 3, axis=2).astype(np.uint8)
    assert np.abs(fit_to_bucket(pixels, Bucket(64, 64)).astype(int) - 127).max() <= 2


def test_a_thin_line_costs_no_more_than_its_crop() -> None:
    fitted = fit_to_bucket(photo(MAX_SIDE_PX, 1), max(SDXL_BUCKETS))
    assert fitted.shape == (512, 2048, 3)
