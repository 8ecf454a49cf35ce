"""What a run refuses before it trains, and what it does with numbers that are not finite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.distill_cache import DistillCache, build_all, write_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_distill.builder.launch import Launch
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.demo.family import Family, build_untrained_family
from sdxl_distill.errors import (
    ConfigError,
    CorruptError,
    IncompatibleError,
    NumericalError,
    StorageError,
)
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.latents_set import build_latents_set
from sdxl_distill.sets.predictions_set import build_predictions_set, open_latents
from sdxl_distill.sets.text_set import build_text_set
from sdxl_distill.train import session
from sdxl_distill.train.checkpoint import load_checkpoint
from sdxl_distill.train.run_folder import RunFolder
from sdxl_distill.train.session import train_student, usual_reader_threads


def checkpoint_path(config: DistillConfig, step: int) -> Path:
    return RunFolder.of(config).checkpoints().path / f"step-{step:08d}"


@pytest.fixture
def copied(distill_cache: DistillCache, tmp_path: Path) -> DistillCache:
    """A cache of its own for a test that changes it."""
    root = shutil.copytree(distill_cache.root, tmp_path / "cache")
    return DistillCache(root, distill_cache.family)


@pytest.fixture
def student(tiny_family: Family, tmp_path: Path) -> Callable[[str, dict[str, object]], Path]:
    """Makes a copy of the base with other fields in its scheduler."""

    def make(name: str, scheduler: dict[str, object]) -> Path:
        folder = shutil.copytree(tiny_family.base, tmp_path / name)
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
        return folder

    return make


@pytest.fixture
def resumable(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(trained_run, tmp_path / "resumable")


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (8, 1), (16, 3), (96, 4)])
def test_readers_leave_a_core_to_the_training(monkeypatch, num_cores, num_threads) -> None:
    monkeypatch.setattr("sdxl_distill.runtime.world.available_cores", lambda: num_cores)
    assert usual_reader_threads(World(local_size=4, size=4)) == num_threads


def test_the_run_folder_says_what_went_into_it(
    distill_cache: DistillCache, trained_run: Path
) -> None:
    resolved = json.loads((trained_run / "runs" / "run" / "config.json").read_text())
    assert DistillConfig.model_validate(resolved).training.num_steps == 4
    fingerprints = json.loads((trained_run / "runs" / "run" / "fingerprints.json").read_text())
    with distill_cache.teachers() as teachers:
        expected = {each.id: each.manifest.identity.fingerprint for each in teachers}
    assert expected.items() <= fingerprints["sets"].items()


def test_latest_starts_a_run_that_has_no_checkpoint(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config = distill_cache.config(tmp_path, "training.num_steps=1")
    assert train_student(config, resume="latest").global_step == 1
    assert train_student(config, resume="latest").losses == {}  # nothing is left to do


def test_an_existing_run_needs_resume(distill_cache: DistillCache, trained_run: Path) -> None:
    with pytest.raises(ConfigError, match="already has checkpoints, the last of step 4"):
        train_student(distill_cache.config(trained_run))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr=1e-3", r"config.training.lr was 0.0005 and is now 0.001"),
        ("training.seed=1", r"config.training.seed was 42 and is now 1"),
        ("training.loss_type=huber", "config.training.loss_type was 'mse' and is now 'huber'"),
        ("teachers.0.weight=0.5", "config.teachers.ann.weight was 0.75 and is now 0.5"),
        ("student.ema_decay=0.5", "config.student.ema_decay was 0.9999 and is now 0.5"),
        ("student.use_ema=false", "config.student.use_ema was True and is now False"),
        ("training.batch_size=2", "global_batch was 4 and is now 2"),
        ("training.validation.fraction=0", "config.training.validation.fraction was 0.2"),
    ],
)
def test_another_configuration_does_not_resume(
    distill_cache: DistillCache, trained_run: Path, override: str, message: str
) -> None:
    config = distill_cache.config(trained_run, "training.num_steps=5", override)
    with pytest.raises(IncompatibleError, match=message):
        train_student(config, resume="latest")


def test_what_changes_no_step_may_change(distill_cache: DistillCache, resumable: Path) -> None:
    config = distill_cache.config(
        resumable,
        "training.num_steps=5",
        "training.batch_size=2",
        "training.gradient_accumulation_steps=2",
        "training.log_every=1",
        "training.validation.every=100",
        "data.reader_threads=1",
        "export.dtype=fp32",
        f"data.latent_cache.cache_dir={distill_cache.root / 'latents'}",
    )
    assert train_student(config, resume="latest").global_step == 5


def test_another_student_does_not_resume(
    distill_cache: DistillCache, trained_run: Path, tiny_family: Family
) -> None:
    teacher = tiny_family.teachers[2]
    config = distill_cache.config(trained_run, f"student.checkpoint_path={teacher}")
    with pytest.raises(IncompatibleError, match="differs from its checkpoint: student was"):
        train_student(config, resume="latest")


def test_a_checkpoint_that_is_not_there_is_named(
    distill_cache: DistillCache, trained_run: Path
) -> None:
    with pytest.raises(ConfigError, match="no such checkpoint"):
        train_student(distill_cache.config(trained_run), resume=str(trained_run / "step-00000099"))


@pytest.mark.parametrize(("reference", "num_steps"), [("latest", 3), ("4", 3), ("2", 2), ("4", 4)])
def test_a_run_with_no_step_left_is_refused_with_both_numbers(
    distill_cache: DistillCache, trained_run: Path, reference: str, num_steps: int
) -> None:
    config = distill_cache.config(trained_run, f"training.num_steps={num_steps}")
    is_latest = reference == "latest"
    resume = reference if is_latest else str(checkpoint_path(config, int(reference)))
    done = 4 if is_latest else int(reference)
    expected = f"training.num_steps is {num_steps}, but {done} steps are done"
    with pytest.raises(ConfigError, match=expected) as refused:
        train_student(config, resume=resume)
    assert "export-student --checkpoint" in str(refused.value)


def test_rewinding_sets_later_checkpoints_and_nothing_else_aside(
    distill_cache: DistillCache, resumable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = distill_cache.config(resumable, "training.num_steps=3")
    before = load_checkpoint(checkpoint_path(config, 4))
    train_student(config, resume=str(checkpoint_path(config, 2)))
    folder = RunFolder.of(config).checkpoints()
    assert folder.steps() == [2, 3]
    aside = load_checkpoint(folder.path / "set-aside-1" / "step-00000004")
    assert aside.state == before.state
    assert "goes on from step 2: its later checkpoints are set aside" in caplog.text
    events = EventAccumulator(str(resumable / "logs" / "run"), purge_orphaned_data=True).Reload()
    assert [each.step for each in events.Scalars("distill/loss")] == [2, 3]


def test_a_foreign_state_is_refused(distill_cache: DistillCache, resumable: Path) -> None:
    config = distill_cache.config(resumable)
    folder = RunFolder.of(config).checkpoints()
    checkpoint = load_checkpoint(checkpoint_path(config, 4))
    checkpoint.state["position"] = {"global_step": -1, "epoch": 0, "step": 0}
    path = folder.save(4, checkpoint)
    with pytest.raises(CorruptError, match="position.global_step is -1"):
        train_student(config, resume=str(path))
    del checkpoint.state["position"]
    folder.save(4, checkpoint)
    with pytest.raises(CorruptError, match="no field 'position'"):
        train_student(config, resume=str(path))


def test_a_student_of_another_text_width_is_refused_before_its_weights_are_read(
    distill_cache: DistillCache, tiny_family: Family, tmp_path: Path
) -> None:
    student = shutil.copytree(tiny_family.base, tmp_path / "wide")
    path = student / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 96}))
    config = distill_cache.config(tmp_path, f"student.checkpoint_path={student}")
    with pytest.raises(IncompatibleError, match=r"text embeddings of size.*expected 96"):
        train_student(config)
    assert not RunFolder.of(config).path.exists()


def test_another_configuration_is_refused_before_any_weights_are_read(
    resumable: Path, distill_cache: DistillCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(session, "load_student", loaded)
    config = distill_cache.config(resumable, "training.num_steps=8", "training.lr=1e-5")
    with pytest.raises(IncompatibleError, match=r"config\.training\.lr was 0\.0005"):
        train_student(config, resume="latest")


def test_changed_data_is_refused_or_goes_on_at_the_next_epoch(
    copied: DistillCache, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    train_student(copied.config(folder, "training.num_steps=3"))
    before = load_checkpoint(checkpoint_path(copied.config(folder), 3)).state["position"]
    write_images(copied.root / "images", range(24, 30))
    build_all(copied)

    config = copied.config(folder, "training.num_steps=4")
    with pytest.raises(
        IncompatibleError, match=r"buckets.64x64.num_records was \d+ and is now"
    ) as refused:
        train_student(config, resume="latest")
    assert "data.on_change=next_epoch" in str(refused.value.action)
    going_on = copied.config(folder, "training.num_steps=4", "data.on_change=next_epoch")
    summary = train_student(going_on, resume="latest")
    assert summary.losses["distill/epoch"] == before["epoch"] + 1
    other_batch = copied.config(
        folder, "training.num_steps=5", "data.on_change=next_epoch", "training.batch_size=2"
    )
    with pytest.raises(IncompatibleError, match="global_batch was 4 and is now 2"):
        train_student(other_batch, resume="latest")


def test_a_missing_set_is_named_with_its_command(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config = distill_cache.config(tmp_path, "teachers.1.teacher_id=carl")
    with pytest.raises(ConfigError, match=r"no complete predictions set of teacher carl") as caught:
        train_student(config)
    assert "build_shards.py" in str(caught.value)


def test_missing_shards_are_refused_or_left_out(copied: DistillCache, tmp_path: Path) -> None:
    write_images(copied.root / "images", range(24, 30))
    build_latents_set(copied.builder_config("ann"), Launch(World()))
    build_predictions_set(copied.builder_config("ann"), Launch(World()))
    with pytest.raises(IncompatibleError, match="bob lacks 1 shard.* 64x64") as caught:
        train_student(copied.config(tmp_path))
    assert "build_shards.py" in str(caught.value)
    assert train_student(copied.config(tmp_path, "data.on_missing=intersect")).global_step == 6


def test_a_damaged_record_stops_the_run_and_is_named(copied: DistillCache, tmp_path: Path) -> None:
    """Every shard is damaged, so that the first record that is read is one."""
    for tar in (copied.root / "predictions" / "bob").glob("*.tar"):
        content = bytearray(tar.read_bytes())
        for at in range(1500, len(content), 500):
            content[at] ^= 1
        tar.write_bytes(content)
    with pytest.raises(CorruptError, match=r"set bob, shard bob-.*\.tar") as caught:
        train_student(copied.config(tmp_path))
    assert "_64x" in str(caught.value) or "_96x" in str(caught.value)


def test_a_student_with_another_table_is_refused_before_it_is_loaded(
    distill_cache: DistillCache,
    tmp_path: Path,
    student: Callable[[str, dict[str, object]], Path],
) -> None:
    folder = student("zero", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    next((folder / "unet").glob("*.safetensors")).unlink()
    config = distill_cache.config(tmp_path, f"student.checkpoint_path={folder}")
    with pytest.raises(IncompatibleError, match="noise schedule is .*'zero_terminal_snr': True"):
        train_student(config)


def test_a_student_of_another_prediction_type_learns_converted_targets(
    distill_cache: DistillCache,
    tmp_path: Path,
    student: Callable[[str, dict[str, object]], Path],
) -> None:
    folder = student("velocity", {"prediction_type": "v_prediction"})
    config = distill_cache.config(tmp_path, f"student.checkpoint_path={folder}")
    losses = train_student(config).losses
    assert losses["distill/loss"] > losses["distill/loss_floor"] > 0


def test_epsilon_without_signal_is_refused_for_a_student_of_velocities(
    copied: DistillCache, tmp_path: Path, student: Callable[[str, dict[str, object]], Path]
) -> None:
    """Found from the manifests, not when such a timestep comes up after hours."""
    shutil.rmtree(copied.root / "predictions")
    for teacher_id in ("ann", "bob"):
        zero = "teacher.zero_terminal_snr=true"
        build_predictions_set(copied.builder_config(teacher_id, zero), Launch(World()))
    folder = student("zero", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    config = copied.config(tmp_path, f"student.checkpoint_path={folder}")
    with pytest.raises(IncompatibleError, match=r"ann predicts epsilon up to timestep 999"):
        train_student(config)


def test_a_student_with_other_text_encoders_needs_their_text_set(
    copied: DistillCache, tmp_path: Path
) -> None:
    other = build_untrained_family(tmp_path / "other", seed=1, num_teachers=0).base
    config = copied.config(tmp_path, f"student.text_encoder_id={other}")
    with pytest.raises(IncompatibleError, match=r"build_text\.py"):
        train_student(config)
    builder = copied.builder_config("bob", f"model.text_encoder_id={other}")
    build_text_set(builder, open_latents(builder), Launch(World()))
    assert train_student(config).global_step == 6


def test_an_output_that_cannot_be_written_is_a_storage_error(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for setting in ("run.output_root", "training.tensorboard.base_dir"):
        config = distill_cache.config(tmp_path, f"{setting}={tmp_path / 'file' / 'inside'}")
        with pytest.raises(StorageError, match="inside"):
            train_student(config)


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_records(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    """A rate at which the third step's weights overflow."""
    config = distill_cache.config(
        tmp_path,
        "training.lr=3e37",
        "training.num_steps=20",
        "training.checkpoint_every=1",
        "training.optimizer=adamw",
    )
    with pytest.raises(NumericalError, match="is NaN or infinite") as caught:
        train_student(config)
    message = str(caught.value)
    assert message.count("_64x64") + message.count("_64x96") + message.count("_96x64") == 4
    step = RunFolder.of(config).checkpoints().steps()[-1]
    assert f"the checkpoint of step {step} is intact" in message
    saved = load_checkpoint(checkpoint_path(config, step))
    assert all(tensor.isfinite().all() for tensor in saved.tensors["student"].values())
    with pytest.raises(NumericalError, match="is NaN or infinite"):
        train_student(config, resume="latest")


def test_a_student_that_overflows_at_once_is_told_to_start_again(
    distill_cache: DistillCache, tmp_path: Path, tiny_family: Family
) -> None:
    folder = shutil.copytree(tiny_family.base, tmp_path / "huge")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(1e30)
    unet.save_pretrained(folder / "unet")
    config = distill_cache.config(tmp_path, f"student.checkpoint_path={folder}")
    with pytest.raises(NumericalError, match="the loss is NaN or infinite") as caught:
        train_student(config)
    assert "start again" in str(caught.value)
    assert not RunFolder.of(config).checkpoints().steps()


def test_a_run_that_sees_each_draw_too_often_warns(
    distill_cache: DistillCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """18 images in 2 draws and 4 a step: 16 epochs are about 72 steps."""
    config = distill_cache.config(tmp_path, "training.num_steps=1")
    train_student(config)
    assert "memorise" not in caplog.text
    # Refused at once: only the warning is wanted, not a hundred steps.
    long = distill_cache.config(tmp_path, "training.num_steps=100", "training.lr=1")
    with pytest.raises(IncompatibleError, match="training.lr"):
        train_student(long, resume="latest")
    assert "memorise" in caplog.text
