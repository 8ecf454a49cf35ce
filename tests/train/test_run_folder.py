"""Which fields of a configuration a resumed run must share."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.errors import IncompatibleError
from sdxl_distill.train.run_folder import RunFolder, decisive_fields, require_equal


def config_of(training: dict[str, object] | None = None, **sections: object) -> DistillConfig:
    fields: dict[str, object] = {
        "run": {"name": "a", "output_root": "runs"},
        "student": {"checkpoint_path": "base"},
        "teachers": [{"teacher_id": "ann", "weight": 0.5}, {"teacher_id": "bob", "weight": 0.5}],
        "training": training or {},
    }
    return DistillConfig.model_validate(fields | sections)


def test_places_names_and_intervals_are_free() -> None:
    moved = config_of(
        {"log_every": 1, "checkpoint_every": 7, "tensorboard": {"base_dir": "elsewhere"}},
        device="cpu",
        run={"name": "b"},
        student={"checkpoint_path": "copy/of/base", "text_encoder_id": "base"},
        teachers=[
            {"teacher_id": name, "weight": 0.5, "cache_dir": "moved"} for name in ("ann", "bob")
        ],
        data={"latent_cache": {"cache_dir": "moved"}, "reader_threads": 9},
        export={"dtype": "fp32"},
    )
    assert decisive_fields(moved) == decisive_fields(config_of())


def test_the_length_is_free_only_where_the_rate_does_not_depend_on_it() -> None:
    def fields(schedule: str, num_steps: int) -> dict[str, object]:
        return decisive_fields(config_of({"lr_schedule": schedule, "num_steps": num_steps}))

    assert fields("constant", 2000) == fields("constant", 3000)
    assert fields("cosine", 2000) != fields("cosine", 3000)
    assert fields("constant", 10) != fields("constant", 20), "the warm-up depends on it"


def test_a_usual_warm_up_is_200_steps_or_a_tenth_of_the_run() -> None:
    lengths = {
        num_steps: config_of({"num_steps": num_steps}) for num_steps in (9, 100, 1999, 10**6)
    }
    warm_ups = [config.training.num_warmup_steps for config in lengths.values()]
    assert warm_ups == [0, 10, 199, 200]
    assert config_of({"warmup_steps": 7}).training.num_warmup_steps == 7


def test_every_difference_is_named_with_both_values() -> None:
    found = {"config": decisive_fields(config_of()), "student": "1"}
    other = config_of({"adam_beta1": 0.8}, data={"window": 5})
    with pytest.raises(IncompatibleError) as caught:
        require_equal(found, {"config": decisive_fields(other), "student": "2"}, "step-1")
    message = str(caught.value)
    for part in (
        "step-1: ",
        "config.training.adam_beta1 was 0.9 and is now 0.8",
        "config.data.window was 16384 and is now 5",
        "student was '1' and is now '2'",
    ):
        assert part in message


def test_preparing_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.prepare()
    half = folder.path / "checkpoints" / ".tmp-0123"
    half.mkdir(parents=True)
    (half / "student.safetensors").write_text("half")
    (folder.path / "checkpoints" / "step-00000001").mkdir()
    (folder.path / ".tmp-4567-1").write_text("half a configuration or lock")
    (folder.path / ".tmp-89ab").mkdir()  # an export in the making
    folder.prepare()
    assert sorted(each.name for each in folder.path.iterdir()) == [".tmp-89ab", "checkpoints"]
    assert [each.name for each in half.parent.iterdir()] == ["step-00000001"]
