"""One picture of a finished run: its losses against the floor, and what the models make of photos.

Drawn on a canvas of its own, without a display and without matplotlib's global state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sdxl_distill.demo.curves import read_curves
from sdxl_distill.demo.evaluation import MAX_SHARE_OF_BASE
from sdxl_distill.demo.photo_grid import NUM_STEPS, denoise_photos

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from sdxl_distill.demo.curves import Curve
    from sdxl_distill.demo.evaluation import Evaluation
    from sdxl_distill.demo.photo_grid import PhotoGrid

_INK, _PAPER, _MUTED = "#22262b", "#ffffff", "#80868e"
_STUDENT_COLOR, _BASE_COLOR, _MEAN_COLOR = "#c2410c", "#a3a8ae", "#4b6b8a"
_TEACHER_COLORS = ("#a16207", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#be185d")
_WIDTH_INCHES, _CHARTS_INCHES = 16.0, 4.4
_DOTS_PER_INCH = 120


def draw_picture(
    path: Path,
    log_dir: Path,
    photos: Path,
    base: Path,
    teachers: Sequence[Path],
    student: Path,
    evaluation: Evaluation,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> None:
    """Draw the picture as PNG.

    Args:
        path: the path of the PNG.
        log_dir: TensorBoard folder of the training run.
        photos: held-out photos as `write_photos` writes them.
        base: diffusers folder.
        teachers: diffusers folders; a folder's name is the teacher's id in the logs.
        student: diffusers folder.
        evaluation: the evaluation of the same folders.
        weights: the teachers' weights, summing to 1; equal when None.
        seed: the seed of the noise.
    """
    weights = weights or [1 / len(teachers)] * len(teachers)
    grid = denoise_photos(photos, base, teachers, student, weights, seed)
    tile_inches = _WIDTH_INCHES / len(grid.columns)
    heights = [row[0].shape[0] / row[0].shape[1] for row in grid.rows]
    grid_inches = 0.96 * tile_inches * sum(heights) + 0.9
    figure = Figure(
        figsize=(_WIDTH_INCHES, _CHARTS_INCHES + grid_inches),
        dpi=_DOTS_PER_INCH,
        facecolor=_PAPER,
    )
    upper, lower = cast(
        "Sequence[SubFigure]",
        figure.subfigures(2, 1, height_ratios=(_CHARTS_INCHES, grid_inches)),
    )
    _draw_charts(upper, read_curves(log_dir), [teacher.name for teacher in teachers], evaluation)
    _draw_grid(lower, grid, heights)
    # Without its own version number in it, the file depends on the inputs alone.
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def _draw_charts(
    figure: SubFigure,
    curves: Mapping[str, Curve],
    teacher_ids: Sequence[str],
    evaluation: Evaluation,
) -> None:
    distance, teachers, bars = figure.subplots(1, 3, width_ratios=(1.15, 1.15, 0.9))
    figure.subplots_adjust(left=0.045, right=0.99, top=0.88, bottom=0.13, wspace=0.27)
    _draw_distance(distance, curves)
    _draw_teachers(teachers, curves, teacher_ids)
    _draw_evaluation(bars, evaluation)


def _draw_distance(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """The loss itself: the student's distance to the teachers' average."""
    loss = curves["distill/loss"]
    axes.plot(loss.steps, loss.values, color=_STUDENT_COLOR, alpha=0.25, linewidth=1)
    axes.plot(loss.steps, loss.smoothed(), color=_STUDENT_COLOR, linewidth=2, label="training")
    for tag, label, style in (
        ("distill/validation/loss", "validation", "o-"),
        ("distill/validation_ema/loss", "validation, EMA", "s--"),
    ):
        if tag in curves:
            curve = curves[tag]
            axes.plot(curve.steps, curve.values, style, color=_INK, markersize=4, label=label)
    axes.legend(frameon=False, labelcolor=_INK)
    axes.set_yscale("log")
    _finish(axes, "Student to the teachers' average (loss)")


def _draw_teachers(axes: Axes, curves: Mapping[str, Curve], teacher_ids: Sequence[str]) -> None:
    """The student's distance to each teacher, the average of these, and its floor."""
    colors = zip(teacher_ids, _TEACHER_COLORS * len(teacher_ids), strict=False)
    for teacher_id, color in colors:
        curve = curves[f"distill/loss_{teacher_id}"]
        axes.plot(curve.steps, curve.smoothed(), color=color, linewidth=1.3, label=teacher_id)
    loss, floor = curves["distill/loss"], curves["distill/loss_floor"]
    axes.plot(
        loss.steps,
        loss.smoothed() + floor.smoothed(),
        color=_STUDENT_COLOR,
        linewidth=2.4,
        label="their average",
    )
    axes.plot(floor.steps, floor.smoothed(), ":", color=_INK, linewidth=2, label="floor")
    axes.fill_between(floor.steps, floor.smoothed(), color=_MUTED, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=_INK, ncols=2)
    _finish(axes, "Student to each teacher; no student goes below the floor")


def _draw_evaluation(axes: Axes, evaluation: Evaluation) -> None:
    """Shares of the base's distance on held-out photos."""
    shares = (1.0, evaluation.mean_of_weights_share, evaluation.student_share)
    names = ("base", "mean of the\nteachers' weights", "student")
    bars = axes.barh(names, shares, color=(_BASE_COLOR, _MEAN_COLOR, _STUDENT_COLOR), height=0.6)
    axes.bar_label(
        bars,
        [f"{share:.0%}" for share in shares],
        padding=5,
        color=_INK,
        fontsize=12,
        bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 1},
    )
    axes.axvline(MAX_SHARE_OF_BASE, color=_INK, linestyle=":", linewidth=1.2, zorder=1)
    axes.text(
        MAX_SHARE_OF_BASE + 0.02,
        1.5,
        f"distilled: at most {MAX_SHARE_OF_BASE:.0%},\nand below the mean of weights",
        va="center",
        fontsize=9.5,
        color=_INK,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.17)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    _finish(axes, "Held-out photos: share of base's distance", xlabel="")
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)


def _draw_grid(figure: SubFigure, grid: PhotoGrid, heights: Sequence[float]) -> None:
    axes = figure.subplots(len(grid.rows), len(grid.columns), height_ratios=heights, squeeze=False)
    figure.subplots_adjust(left=0.005, right=0.995, top=0.88, bottom=0.01, wspace=0.03, hspace=0.03)
    figure.suptitle(
        f"Held-out photos, noised to timestep {grid.start_timestep} and denoised in "
        f"{NUM_STEPS} DDIM steps by …",
        color=_INK,
        fontsize=12,
        fontweight="bold",
        y=0.985,
    )
    for row, tiles in zip(axes, grid.rows, strict=True):
        for cell, tile in zip(row, tiles, strict=True):
            cell.imshow(tile, interpolation="bicubic")
            cell.set_axis_off()
    for cell, column in zip(axes[0], grid.columns, strict=True):
        is_student = column == "student"
        cell.set_title(
            column,
            color=_STUDENT_COLOR if is_student else _INK,
            fontsize=11,
            fontweight="bold" if is_student else "normal",
            pad=5,
        )


def _finish(axes: Axes, title: str, xlabel: str = "step") -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", color=_INK, loc="left")
    axes.set_xlabel(xlabel, color=_MUTED)
    axes.set_facecolor(_PAPER)
    axes.grid(color=_MUTED, alpha=0.2, linewidth=0.6)
    axes.tick_params(colors=_MUTED, labelcolor=_INK)
    axes.yaxis.set_minor_formatter(NullFormatter())
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_MUTED)
