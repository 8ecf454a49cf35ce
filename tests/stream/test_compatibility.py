"""Sets that do not belong together are refused, naming the field and both values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.shard_sets import ShardSets

from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.errors import ConfigError, IncompatibleError
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.stream.loader import JoinedStream


def open_stream(*directories: Path, **options: Any) -> JoinedStream:
    opened = [open_shard_set(directory) for directory in directories]
    return JoinedStream(opened, global_batch=2, **options)


@pytest.mark.parametrize(
    ("field", "value", "default"),
    [("base_seed", 43, 42), ("min_timestep", 5, 0), ("max_timestep", 900, 1000)],
)
def test_teachers_that_were_asked_differently_are_refused(
    sets: ShardSets, field: str, value: int, default: int
) -> None:
    directories = sets.teacher("a"), sets.teacher("b", recipe={field: value})
    expected = f"set b has noise.{field} {value}; expected noise.{field} {default} as in set a"
    with pytest.raises(IncompatibleError, match=expected) as caught:
        open_stream(*directories)
    assert all(str(directory) in str(caught.value) for directory in directories)


def test_every_field_that_differs_is_named(sets: ShardSets) -> None:
    recipe = {"base_seed": 1, "max_timestep": 500}
    with pytest.raises(IncompatibleError, match=r"noise.base_seed 1, noise.max_timestep 500;"):
        open_stream(sets.teacher("a"), sets.teacher("b", recipe=recipe))


def test_noise_of_an_unknown_algorithm_is_refused(sets: ShardSets) -> None:
    teacher = sets.teacher("a", recipe={"algorithm": "philox-ziggurat64-2"})
    with pytest.raises(IncompatibleError, match="'philox-ziggurat64-2'; expected 'philox-zig"):
        open_stream(teacher)


def test_timesteps_beyond_the_schedule_are_refused(sets: ShardSets) -> None:
    teacher = sets.teacher("a", recipe={"max_timestep": 1001})
    with pytest.raises(IncompatibleError, match="max_timestep 1001; expected at most 1000"):
        open_stream(teacher)


def test_another_table_is_refused_by_the_field_that_makes_it(sets: ShardSets) -> None:
    other = sets.teacher("b", schedule=NoiseSchedule(zero_terminal_snr=True))
    with pytest.raises(
        IncompatibleError, match=r"noise_schedule.zero_terminal_snr True; .* False as in set a"
    ):
        open_stream(sets.teacher("a"), other)


def test_another_prediction_type_is_welcome(sets: ShardSets) -> None:
    other = sets.teacher("b", schedule=NoiseSchedule(prediction_type="v_prediction"))
    with open_stream(sets.teacher("a"), other) as stream:
        assert stream.prediction_types == ("epsilon", "v_prediction")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"vae": "9" * 64}, r"latents.content.vae '9+'; expected latents.content.vae '2+' as"),
        ({"buckets": [[64, 64]]}, r"latents.content.buckets \[\[64, 64\]\]; expected .*128"),
    ],
)
def test_another_vae_or_other_resolutions_are_named(
    sets: ShardSets, tmp_path: Path, content: dict[str, Any], named: str
) -> None:
    others = replace(sets, root=tmp_path / "others")
    others.latents(**content)
    with pytest.raises(IncompatibleError, match=named):
        open_stream(sets.teacher("a"), others.teacher("b"))


def test_other_latents_that_are_gone_are_told_by_fingerprint(
    sets: ShardSets, tmp_path: Path
) -> None:
    others = replace(sets, root=tmp_path / "others")
    others.latents(vae="9" * 64)
    other = others.teacher("b")
    (others.root / "latents" / "manifest.json").unlink()
    with pytest.raises(IncompatibleError, match=r"set b has latents '[0-9a-f]{64}'; expected"):
        open_stream(sets.teacher("a"), other)


def test_latents_elsewhere_are_joined_when_they_are_the_same(
    sets: ShardSets, tmp_path: Path
) -> None:
    teacher = sets.teacher("a")
    moved = (sets.root / "latents").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="there is no shard set"):
        open_stream(teacher)
    with open_stream(teacher, latents=open_shard_set(moved)) as stream:
        next(stream.epoch(0))


def test_latents_that_are_not_the_teachers_are_refused(sets: ShardSets, tmp_path: Path) -> None:
    others = replace(sets, root=tmp_path / "others")
    latents = open_shard_set(others.latents(vae="9" * 64))
    with pytest.raises(IncompatibleError, match=r"the latents of set a"):
        open_stream(sets.teacher("a"), latents=latents)


def test_missing_text_embeddings_name_the_command_that_builds_them(sets: ShardSets) -> None:
    sets.text("5" * 64)
    with pytest.raises(IncompatibleError) as caught:
        open_stream(sets.teacher("a"), sets.teacher("b"), text_fingerprint="7" * 64)
    message = str(caught.value)
    assert f"a has {'1' * 64}, b has {'1' * 64}" in message
    assert f"expected text {'7' * 64}" in message
    assert "tools/build_text.py --config" in message
    assert "--set model.text_encoder_id=" in message


def test_a_text_set_of_other_encoders_is_refused(sets: ShardSets) -> None:
    text = open_shard_set(sets.text("5" * 64))
    with pytest.raises(IncompatibleError, match=f"has text {'5' * 64}; expected {'1' * 64}"):
        open_stream(sets.teacher("a"), text=text)


def test_a_text_set_of_other_latents_is_refused(sets: ShardSets, tmp_path: Path) -> None:
    others = replace(sets, root=tmp_path / "others")
    others.latents(vae="9" * 64)
    text = open_shard_set(others.text())
    with pytest.raises(IncompatibleError, match=r"set text-1+ has latents.content.vae '9+'"):
        open_stream(sets.teacher("a"), text=text)


def test_two_sets_with_one_id_are_refused(sets: ShardSets) -> None:
    directories = sets.teacher("a"), sets.teacher("a", folder="elsewhere", version="2")
    with pytest.raises(IncompatibleError, match="two sets with the id a") as caught:
        open_stream(*directories)
    assert all(str(directory) in str(caught.value) for directory in directories)


def test_one_set_given_twice_is_refused(sets: ShardSets) -> None:
    directory = sets.teacher("a")
    with pytest.raises(IncompatibleError, match="two sets with the id a"):
        open_stream(directory, directory)


def test_a_teacher_called_like_the_latents_is_refused(sets: ShardSets) -> None:
    with pytest.raises(IncompatibleError, match="two sets with the id latents"):
        open_stream(sets.teacher("latents"))


def test_latents_in_place_of_a_teacher_are_refused(sets: ShardSets) -> None:
    with pytest.raises(ConfigError, match="latents is a latents set; expected a predictions set"):
        open_stream(sets.root / "latents")


def test_no_teacher_is_refused() -> None:
    none: list[ShardSet] = []
    with pytest.raises(ConfigError, match="no predictions set"):
        JoinedStream(none, global_batch=2)


def test_records_of_another_geometry_are_refused(
    sets: ShardSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = sets.teacher("a")
    monkeypatch.setattr("support.shard_sets.HIDDEN_SIZE", 6)
    with pytest.raises(
        IncompatibleError, match=r"encoder_hidden_states \[3, 6\]; .*\[3, 8\] as in set a"
    ):
        open_stream(good, sets.teacher("b"))
