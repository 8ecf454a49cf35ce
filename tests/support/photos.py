"""Images for the builders' tests: real photos in every format that is read, and random ones.

The photos lie inside scikit-image; nothing is downloaded.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

LONG_CAPTION = "the garden behind the house " * 30
CAPTIONS = {
    "people/astronaut.jpg": "a photo of an astronaut",
    "people/astronaut_again.jpg": "the same picture, told otherwise",
    "people/sideways.jpg": "a photo of a cat in the grass",
    "nature/cat.png": "a photo of a cat in the grass",
    "nature/clear.png": "ein Café – 猫 🐈, halb durchsichtig",
    "nature/stars.bmp": LONG_CAPTION,
    "things/coffee.webp": "a photo of a cup of coffee",
    "things/bricks.png": "",
    "things/rocket.tif": "a rocket, 16:9",
    "banner.png": "A Photo, with  spaces and CAPITALS!",
}
"""By source; `things/print.jpg` and `small.png` have no caption file."""
BAD_SOURCES = ("things/cut.jpg", "things/empty.png", "things/text.jpg")


def write_photos(folder: Path) -> None:
    """Write 11 pictures, one of them twice, and 3 files that are no pictures."""
    for name in ("people", "nature", "things"):
        (folder / name).mkdir(parents=True)
    astronaut, cat = _photo("astronaut.png", 180), _photo("chelsea.png", 200)
    astronaut.save(folder / "people/astronaut.jpg", quality=92)
    shutil.copy(folder / "people/astronaut.jpg", folder / "people/astronaut_again.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    cat.transpose(Image.Transpose.ROTATE_90).save(folder / "people/sideways.jpg", exif=exif)
    cat.save(folder / "nature/cat.png")
    clear = cat.resize((120, 160)).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "nature/clear.png")
    _photo("hubble_deep_field.jpg", 150).save(folder / "nature/stars.bmp")
    _photo("coffee.png", 190).save(folder / "things/coffee.webp", quality=90)
    bricks = np.asarray(_photo("brick.png", 140).convert("L")).astype(np.uint16)
    Image.fromarray(bricks * 257).save(folder / "things/bricks.png")
    _photo("rocket.jpg", 160).save(folder / "things/rocket.tif")
    _photo("coffee.png", 130).convert("CMYK").save(folder / "things/print.jpg")
    cat.crop((0, 0, 200, 20)).save(folder / "banner.png")
    cat.crop((0, 0, 37, 29)).save(folder / "small.png")

    (folder / "things/empty.png").touch()
    (folder / "things/text.jpg").write_text("no picture")
    whole = (folder / "people/sideways.jpg").read_bytes()
    (folder / "things/cut.jpg").write_bytes(whole[: len(whole) // 2])
    for source, caption in CAPTIONS.items():
        (folder / source).with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")


def write_image(
    path: Path, seed: int, width: int = 128, height: int = 128, caption: str | None = None
) -> Path:
    """Write a PNG of random pixels, and its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_images(folder: Path, num_images: int, *, first: int = 0) -> None:
    """Write random images in turn for each bucket of the tests; captions repeat."""
    sizes = ((128, 128), (160, 96), (96, 160), (128, 96))
    for number in range(first, first + num_images):
        width, height = sizes[number % len(sizes)]
        caption = f"photo {number % 5}"
        write_image(folder / f"{number:03}.png", number, width, height, caption)


def damage_pixels(path: Path) -> None:
    """Cut a picture in the middle of its pixels: the header stays as it was."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def _photo(name: str, width: int) -> Image.Image:
    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None
    with Image.open(Path(spec.origin).parent / "data" / name) as image:
        return image.convert("RGB").resize((width, width * image.height // image.width))
