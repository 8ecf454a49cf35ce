"""What the demo prints at its end: what was built, what it proves, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdxl_distill.demo.configurations import RUN_NAME
from sdxl_distill.demo.evaluation import MAX_SHARE_OF_BASE, Evaluation
from sdxl_distill.demo.photos import PhotoFolders
from sdxl_distill.shards.shard_set import open_shard_set

_OWN_CHECKPOINTS = """\
The same with your own checkpoints (README.md, "Your own checkpoints"):
  accelerate launch tools/build_latents.py --config configs/cache_builder.json
  accelerate launch tools/build_shards.py  --config configs/cache_builder.json   # per teacher
  python tools/verify_shards.py --cache-dir ./cache/teacher_predictions/teacher_v1
  accelerate launch train.py --config configs/distill.json"""


def print_demo_summary(
    folder: Path,
    photos: PhotoFolders,
    evaluation: Evaluation,
    picture: Path,
    seconds: Mapping[str, float],
) -> None:
    """Print the summary.

    Args:
        folder: the demo's folder.
        photos: the photos that were used.
        evaluation: the student's evaluation.
        picture: the picture that was drawn.
        seconds: the seconds of each phase, in order.
    """
    # Every set with its size.
    print(f"\n{'─' * 78}\nBuilt in {folder}")
    for place in sorted(_set_folders(folder)):
        with open_shard_set(place) as shard_set:
            manifest = shard_set.manifest
            num_bytes = sum(path.stat().st_size for path in place.iterdir() if path.is_file())
            print(
                f"  {place.relative_to(folder)!s:<42} {manifest.num_records:>5} records "
                f"{len(manifest.shards):>4} shards {num_bytes / 1e6:>7.2f} MB"
            )
    # Time, and the proof.
    print("\nSeconds")
    for phase, duration in seconds.items():
        print(f"  {duration:>6.1f}  {phase}")
    print(f"  {sum(seconds.values()):>6.1f}  together")
    _print_proof(photos, evaluation)
    # Where to look, and how to do the same with other checkpoints.
    print("\nLook at")
    print(f"  {picture}   losses and denoised photos")
    print(f"  tensorboard --logdir {folder / 'logs'}")
    print(f"  {folder / 'runs' / RUN_NAME / 'export'}   for StableDiffusionXLPipeline")
    print(f"  {folder / 'configs'}   the configurations of the commands above\n")
    print(_OWN_CHECKPOINTS)


def _print_proof(photos: PhotoFolders, evaluation: Evaluation) -> None:
    print(
        f"\nMean squared distance to the teachers' average, {photos.num_held_out} held-out photos, "
        f"{evaluation.num_predictions} predictions with fresh noise and timesteps"
    )
    rows = {
        "base (where the student started)": (evaluation.base, 1.0),
        "mean of the teachers' weights": (
            evaluation.mean_of_weights,
            evaluation.mean_of_weights_share,
        ),
        "student": (evaluation.student, evaluation.student_share),
    }
    for name, (distance, share) in rows.items():
        print(f"  {name:<34} {distance:.5f}   {share:6.3f} of the base")
    verdict = "distilled" if evaluation.has_distilled else "NOT distilled"
    print(f"  → {verdict}: at most {MAX_SHARE_OF_BASE} of the base and below the mean of weights")


def _set_folders(folder: Path) -> list[Path]:
    return [path.parent for path in (folder / "cache").rglob("manifest.json")]
