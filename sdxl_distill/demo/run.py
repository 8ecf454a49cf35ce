"""The demo, phase by phase: photos, family, latents, teachers, verification, student, proof."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Final, NoReturn

from tqdm import tqdm

from sdxl_distill.demo.commands import PhaseClock, launch
from sdxl_distill.demo.configurations import (
    RUN_NAME,
    DemoConfigurations,
    write_configurations,
)
from sdxl_distill.demo.evaluation import Evaluation, evaluate
from sdxl_distill.demo.family import Family, build_family
from sdxl_distill.demo.looks import LOOKS
from sdxl_distill.demo.photos import PhotoFolders, write_photos
from sdxl_distill.demo.picture import draw_picture
from sdxl_distill.demo.summary import print_demo_summary
from sdxl_distill.errors import ConfigError

NUM_PROCESSES: Final = 2
_MARK: Final = "made-by-sdxl-distill-demo"


def run_demo(folder: Path) -> Evaluation:
    """Run everything in a folder and return the proof.

    Args:
        folder: the folder to make; that of an earlier demo is replaced.

    Raises:
        ConfigError: when the folder holds something else.
        DistillError: when a phase fails, or the exported student is missing.
    """
    # The inputs: photos, and models fine-tuned on them.
    _make_folder(folder)
    clock = PhaseClock()
    photos = _write_photos(folder, clock)
    family = _train_family(folder, photos, clock)
    # What a user does: build, verify, train.
    configurations = write_configurations(folder, list(LOOKS))
    _build(folder, configurations, clock)
    _verify(folder, configurations, clock)
    launch(["train", "--config", configurations.distill], folder, num_processes=NUM_PROCESSES)
    clock.finish("train the student on two processes, export it")

    # Whether it worked.
    print("\nHow far from the teachers' average, on photos that no model has seen?", flush=True)
    student = folder / "runs" / RUN_NAME / "export"
    evaluation = evaluate(photos.held_out, family.base, family.teachers, student)
    (folder / "evaluation.json").write_text(json.dumps(asdict(evaluation), indent=2) + "\n")
    clock.finish("evaluate on held-out photos")
    picture = folder / "demo.png"
    log_folder = folder / "logs" / RUN_NAME
    draw_picture(
        picture, log_folder, photos.held_out, family.base, family.teachers, student, evaluation
    )
    clock.finish("draw the picture")
    print_demo_summary(folder, photos, evaluation, picture, clock.seconds)
    return evaluation


def _make_folder(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise ConfigError(
                "the folder holds something that was not made by the demo",
                where=str(folder),
                action="choose another one with --output",
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def _write_photos(folder: Path, clock: PhaseClock) -> PhotoFolders:
    photos = write_photos(folder / "photos")
    print(
        f"{photos.num_train} crops of photos to learn from, {photos.num_held_out} of other photos "
        "held out"
    )
    clock.finish("crop the photos")
    return photos


def _train_family(folder: Path, photos: PhotoFolders, clock: PhaseClock) -> Family:
    print(f"\nTraining a tiny SDXL and three teachers from it: {', '.join(LOOKS)}", flush=True)
    bars: dict[str, tqdm[NoReturn]] = {}

    def show(name: str, step: int, num_steps: int, loss: float) -> None:
        if name not in bars:
            bars[name] = tqdm(total=num_steps, desc=f"{name:>6}", unit="step")
        bar = bars[name]
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update(step - bar.n)
        if step == num_steps:
            bar.close()

    family = build_family(folder / "family", photos.train, progress=show)
    clock.finish("train the base and three teachers")
    return family


def _build(folder: Path, configurations: DemoConfigurations, clock: PhaseClock) -> None:
    first = next(iter(configurations.builders.values()))
    launch(["build-latents", "--config", first], folder)
    clock.finish("build the latents")
    for path in configurations.builders.values():
        launch(["build-shards", "--config", path], folder, num_processes=NUM_PROCESSES)
    clock.finish("build three teachers' predictions on two processes")


def _verify(folder: Path, configurations: DemoConfigurations, clock: PhaseClock) -> None:
    root = "cache/teacher_predictions"
    first, *others = configurations.builders
    siblings = f"{root}/{{{','.join(others)}}}"
    launch(["verify-shards", "--cache-dir", f"{root}/{first}", "--against", siblings], folder)
    for name in others:
        launch(["verify-shards", "--cache-dir", f"{root}/{name}"], folder)
    clock.finish("verify every set")
