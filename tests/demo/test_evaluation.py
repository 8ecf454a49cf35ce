from __future__ import annotations

import pytest
import torch

from sdxl_distill.demo.evaluation import Evaluation, evaluate, mean_of_weights
from sdxl_distill.demo.family import write_teacher
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import load_unet

pytestmark = pytest.mark.processors


def _evaluate(photo_folders, family, student, teachers=None, **options):
    teachers = family.teachers if teachers is None else teachers
    return evaluate(photo_folders.held_out, family.base, teachers, student, num_draws=1, **options)


def _unet(folder):
    return load_unet(ModelFolder.resolve(str(folder)), torch.float32, "cpu")


def test_the_base_as_student_is_as_far_as_the_base(photo_folders, tiny_family):
    result = _evaluate(photo_folders, tiny_family, tiny_family.base)
    assert result.student == result.base > 0
    assert result.student_share == 1
    assert result.num_predictions == photo_folders.num_held_out


def test_the_mean_of_weights_as_student_is_as_far_as_itself(photo_folders, tiny_family, tmp_path):
    weights = [0.5, 0.3, 0.2]
    mean = mean_of_weights([_unet(folder) for folder in tiny_family.teachers], weights)
    write_teacher(tmp_path / "mean", tiny_family.base, mean)
    result = _evaluate(photo_folders, tiny_family, tmp_path / "mean", weights=weights)
    assert result.student == pytest.approx(result.mean_of_weights)
    assert result.spread > 0


def test_a_student_equal_to_the_only_teacher_is_at_distance_zero(photo_folders, tiny_family):
    (teacher, *_) = tiny_family.teachers
    result = _evaluate(photo_folders, tiny_family, teacher, teachers=[teacher])
    assert result.student == result.spread == 0
    assert result.base > 0


def test_mean_of_weights_averages_every_tensor(tiny_family):
    first, second, _ = (_unet(folder) for folder in tiny_family.teachers)
    mean = mean_of_weights([first, second], [0.25, 0.75]).state_dict()
    for name, tensor in first.state_dict().items():
        expected = torch.lerp(tensor, second.state_dict()[name], 0.75)
        torch.testing.assert_close(mean[name], expected)


def test_another_seed_draws_other_noise(photo_folders, tiny_family):
    student = tiny_family.teachers[0]
    first, second = (_evaluate(photo_folders, tiny_family, student, seed=seed) for seed in (0, 1))
    assert first != second
    assert first.student == pytest.approx(second.student, rel=0.5)


@pytest.mark.parametrize(
    ("student", "mean", "expected"),
    [(0.25, 0.3, True), (0.26, 0.3, False), (0.2, 0.2, False), (0.2, 0.19, False)],
)
def test_distilled_means_a_quarter_of_the_base_and_below_the_mean(student, mean, expected):
    assert Evaluation(1.0, mean, student, 1.0, 1).has_distilled is expected
