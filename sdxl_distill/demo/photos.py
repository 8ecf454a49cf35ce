"""Crops of real photos that lie inside installed packages, written as an image folder.

Each photo gives crops in four aspect ratios, each with a caption next to it. Whole photos are kept
out of training, so that no part of a held-out crop was ever seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

BUCKETS = (Bucket(128, 128), Bucket(160, 96), Bucket(96, 160), Bucket(128, 96))
"""The demo's resolutions in pixels."""

NUM_CROPS = {"train": 2, "held_out": 1}
"""Crops of each photo in each bucket."""

_ASPECT_WORDS = dict(zip(BUCKETS, ("square", "wide", "tall", "landscape"), strict=True))
_CLOSE_UP = 0.7


@dataclass(frozen=True)
class Photo:
    """One photo inside a package.

    Attributes:
        package: the package that holds it, which is not imported.
        path: the path inside the package.
        subset: the folder that its crops go to.
        subject: the text of its captions.
        is_held_out: True keeps it out of training.
    """

    package: str
    path: str
    subset: str
    subject: str
    is_held_out: bool = False

    @property
    def name(self) -> str:
        """File name without folder and suffix."""
        return Path(self.path).stem

    def locate(self) -> Path:
        """Return the file's path, without importing its package, which may take seconds.

        Raises:
            ConfigError: when the package is not installed.
        """
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"package {self.package}, which holds the photo {self.name}, is not installed",
                action="pip install 'sdxl_distill[demo]'",
            )
        return Path(spec.origin).parent / self.path


PHOTOS = (
    Photo("skimage", "data/astronaut.png", "people", "an astronaut in an orange suit"),
    Photo("skimage", "data/camera.png", "people", "a man behind a camera on a tripod"),
    Photo(
        "matplotlib",
        "mpl-data/sample_data/grace_hopper.jpg",
        "people",
        "a woman in a navy uniform before a flag",
    ),
    Photo("skimage", "data/motorcycle_left.png", "things", "a red motorcycle in a garage"),
    Photo("skimage", "data/rocket.jpg", "things", "a rocket on its launch pad at dusk"),
    Photo("skimage", "data/hubble_deep_field.jpg", "nature", "galaxies in the black of deep space"),
    Photo("skimage", "data/retina.jpg", "nature", "the red retina of an eye"),
    Photo("skimage", "data/moon.png", "nature", "craters on the grey moon"),
    Photo("skimage", "data/ihc.png", "nature", "brown and blue cells under a microscope"),
    Photo("sklearn", "datasets/images/flower.jpg", "nature", "an orange dahlia before dark leaves"),
    Photo("skimage", "data/brick.png", "things", "a grey wall of bricks"),
    Photo("skimage", "data/coins.png", "things", "old silver coins on dark cloth"),
    Photo("skimage", "data/chelsea.png", "held_out", "the face of a tabby cat", True),
    Photo("skimage", "data/coffee.png", "held_out", "a cup of coffee on a wooden table", True),
    Photo("sklearn", "datasets/images/china.jpg", "held_out", "a temple above a lake", True),
)


@dataclass(frozen=True)
class PhotoFolders:
    """Two image folders with captions.

    Attributes:
        train: crops to train on, in one folder per subset.
        held_out: crops of the photos that training never sees.
        num_train: images in `train`.
        num_held_out: images in `held_out`.
    """

    train: Path
    held_out: Path
    num_train: int
    num_held_out: int


def write_photos(
    directory: str | Path, seed: int = 0, progress: Callable[[str], None] = lambda _: None
) -> PhotoFolders:
    """Write `train/{subset}/*.jpg` and `held_out/*.jpg`, each with its `.txt` caption.

    Args:
        directory: the folder, made if absent; files of an earlier call are written again.
        seed: the seed of the crops' positions.
        progress: a function that gets one line per photo.

    Raises:
        ConfigError: when a package that holds photos is not installed.
    """
    directory = Path(directory)
    generator = np.random.Generator(np.random.Philox(seed))
    counts = {"train": 0, "held_out": 0}
    for photo in PHOTOS:
        # A photo goes to one of the two folders with all its crops.
        split = "held_out" if photo.is_held_out else "train"
        folder = directory / split if photo.is_held_out else directory / split / photo.subset
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(photo.locate()) as image:
            picture = image.convert("RGB")
        for bucket in BUCKETS:
            for number in range(NUM_CROPS[split]):
                crop, is_close = _random_crop(picture, bucket, generator)
                path = folder / f"{photo.name}-{bucket}-{number}.jpg"
                crop.save(path, quality=95, subsampling=0)
                path.with_suffix(".txt").write_text(_caption(photo, bucket, is_close) + "\n")
                counts[split] += 1
        progress(f"{photo.name}: {photo.subject}")
    return PhotoFolders(
        directory / "train", directory / "held_out", counts["train"], counts["held_out"]
    )


def _random_crop(
    picture: Image.Image, bucket: Bucket, generator: np.random.Generator
) -> tuple[Image.Image, bool]:
    """Cut a random box of the bucket's aspect ratio, mirrored or not, and resize it.

    Returns:
        (crop, is_close): is_close when the box shows little of the photo.
    """
    share = generator.uniform(0.5, 1.0)
    scale = share * min(picture.width / bucket.width, picture.height / bucket.height)
    width_px, height_px = scale * bucket.width, scale * bucket.height
    left = generator.uniform(0, picture.width - width_px)
    top = generator.uniform(0, picture.height - height_px)
    box = (left, top, left + width_px, top + height_px)
    crop = picture.resize(bucket, Image.Resampling.LANCZOS, box=box)
    if generator.random() < 0.5:
        crop = ImageOps.mirror(crop)
    return crop, share < _CLOSE_UP


def _caption(photo: Photo, bucket: Bucket, is_close: bool) -> str:
    view = "a close-up" if is_close else "a photo"
    return f"{view} of {photo.subject}, {_ASPECT_WORDS[bucket]}"
