from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from sdxl_distill.demo.evaluation import Evaluation
from sdxl_distill.demo.picture import draw_picture

TAGS = ("loss", "loss_floor", "loss_teacher_a", "loss_teacher_b", "loss_teacher_c")


@pytest.fixture(scope="module", params=[False, True], ids=["without validation", "with validation"])
def log_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    with SummaryWriter(str(folder)) as writer:
        for step in range(1, 21):
            for number, tag in enumerate(TAGS, start=1):
                writer.add_scalar(f"distill/{tag}", number / step, step)
            if request.param:
                writer.add_scalar("distill/validation/loss", 2 / step, step)
                writer.add_scalar("distill/validation_ema/loss", 3 / step, step)
    return folder


def test_the_picture_is_a_png_of_charts_above_photos(log_dir, photo_folders, tiny_family, tmp_path):
    path = tmp_path / "demo.png"
    draw_picture(
        path,
        log_dir,
        photo_folders.held_out,
        tiny_family.base,
        tiny_family.teachers,
        tiny_family.base,
        Evaluation(1.0, 0.2, 0.1, 0.5, 12),
    )
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    assert width == 1920 and height > 800
    # Photos leave little white below; charts leave much above.
    white = (pixels == 255).all(axis=2)
    assert white[: height // 3].mean() > 0.6
    assert white[height * 2 // 3 :].mean() < 0.2
