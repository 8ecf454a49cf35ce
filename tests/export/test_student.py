"""The exported folder, read by diffusers, and used as a teacher."""

from __future__ import annotations

import io
import resource
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from support.distill_cache import DistillCache
from support.patience import wait_until

from sdxl_distill.builder.launch import Launch
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.demo.family import Family
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError, StorageError
from sdxl_distill.export.student import DTYPES, export_student, require_exportable
from sdxl_distill.models.fingerprint_memory import memory_folder
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.predictions_set import build_predictions_set
from sdxl_distill.train.checkpoint import load_checkpoint
from sdxl_distill.train.run_folder import RunFolder
from sdxl_distill.train.session import train_student

COMPONENTS = ("vae", "text_encoder", "text_encoder_2")


@pytest.fixture
def config(distill_cache: DistillCache, trained_run: Path) -> DistillConfig:
    return distill_cache.config(trained_run, "export.dtype=fp32")


def pipeline_of(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_diffusers_loads_the_folder_and_samples(
    config: DistillConfig, tmp_path: Path, scheduler: type
) -> None:
    pipeline = pipeline_of(export_student(config, destination=tmp_path / "export"))
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    images = pipeline(
        "a photo of a cat",
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images.shape == (1, 64, 64, 3)
    assert torch.from_numpy(images).isfinite().all()
    assert images.std() > 0


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_unet_holds_the_chosen_weights_in_the_chosen_dtype(
    distill_cache: DistillCache, trained_run: Path, tmp_path: Path, weights: str, dtype: str
) -> None:
    config = distill_cache.config(trained_run, f"export.dtype={dtype}")
    folder = export_student(config, weights=weights, destination=tmp_path / "export")
    unet = pipeline_of(folder).unet
    _, saved = RunFolder.of(config).checkpoints().load_latest()
    expected = saved.tensors["student" if weights == "raw" else "ema"]
    found = unet.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(DTYPES[dtype]).float())
    stored = ModelFolder.resolve(str(folder)).unet.tensors
    assert {tensor.dtype for tensor in stored.values()} == {
        {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[dtype]
    }


def test_a_student_without_a_vae_is_exported_with_another_s(
    distill_cache: DistillCache, trained_run: Path, tmp_path: Path, tiny_family: Family
) -> None:
    bare = shutil.copytree(tiny_family.base, tmp_path / "bare")
    shutil.rmtree(bare / "vae")
    settings = [f"student.checkpoint_path={bare}"]
    with pytest.raises(ConfigError, match=r"no folder vae.*\n.*export\.vae_id"):
        require_exportable(distill_cache.config(trained_run, *settings))
    config = distill_cache.config(trained_run, *settings, f"export.vae_id={tiny_family.base}")
    require_exportable(config)
    exported = ModelFolder.resolve(str(export_student(config, destination=tmp_path / "export")))
    expected = ModelFolder.resolve(str(tiny_family.base)).vae_fingerprint()
    assert exported.vae_fingerprint() == expected


def test_an_export_reads_what_it_writes_and_nothing_else(
    distill_cache: DistillCache, trained_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    config = distill_cache.config(run, "export.dtype=fp32")
    for damaged in ("optimizer", "student"):  # neither is part of an exported average
        for path in run.rglob(f"{damaged}.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])

    def num_bytes_read() -> int:
        (line,) = (
            each for each in Path("/proc/self/io").read_text().splitlines() if "rchar" in each
        )
        return int(line.split()[1])

    # The first ones import libraries, and read the base until its files are old enough.
    wait_until(lambda: _has_exported(config, tmp_path) and any(memory_folder().glob("*.json")))
    before = num_bytes_read()
    folder = export_student(config, destination=tmp_path / "export", overwrite=True)
    num_read = num_bytes_read() - before
    num_written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    base = ModelFolder.resolve(str(config.student.checkpoint_path))
    num_copied = sum(len(each.tensors) for each in (base.vae, *base.text_encoders))
    # A file is read a buffer at a time, which tensors as small as these do not fill.
    assert num_read <= 1.1 * num_written + num_copied * io.DEFAULT_BUFFER_SIZE


def _has_exported(config: DistillConfig, folder: Path) -> bool:
    return export_student(config, destination=folder / "export", overwrite=True).is_dir()


def test_all_else_is_the_base_s(config: DistillConfig, tmp_path: Path, tiny_family: Family) -> None:
    ours = pipeline_of(export_student(config, destination=tmp_path / "export"))
    theirs = pipeline_of(tiny_family.base)
    for name in COMPONENTS:
        left, right = (getattr(each, name).state_dict() for each in (ours, theirs))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in right)
    assert ours.scheduler.config == theirs.scheduler.config
    prompt = "a red flower in the garden, a photo"
    for left, right in zip(ours.encode_prompt(prompt), theirs.encode_prompt(prompt), strict=True):
        assert torch.equal(left, right)


def test_text_encoders_are_those_that_the_student_was_conditioned_on(
    distill_cache: DistillCache, trained_run: Path, tmp_path: Path, tiny_family: Family
) -> None:
    other = shutil.copytree(tiny_family.base, tmp_path / "other")
    pipeline = pipeline_of(other)
    with torch.no_grad():
        for weight in pipeline.text_encoder.parameters():
            weight.mul_(2)
    pipeline.text_encoder.save_pretrained(other / "text_encoder")
    config = distill_cache.config(
        trained_run, f"student.text_encoder_id={other}", "export.dtype=fp32"
    )
    exported = ModelFolder.resolve(str(export_student(config, destination=tmp_path / "export")))
    assert exported.text_fingerprint() == ModelFolder.resolve(str(other)).text_fingerprint()
    assert (
        exported.text_fingerprint() != ModelFolder.resolve(str(tiny_family.base)).text_fingerprint()
    )


def test_an_exported_student_is_a_teacher(
    distill_cache: DistillCache, config: DistillConfig, tmp_path: Path
) -> None:
    folder = export_student(config, destination=tmp_path / "export")
    builder = distill_cache.builder_config(
        "bob",
        f"teacher.checkpoint_path={folder}",
        "teacher.teacher_id=student",
        f"cache.output_dir={tmp_path / 'predictions'}",
    )
    built = build_predictions_set(builder, Launch(World())).predictions.manifest
    assert sum(entry.num_records for entry in built.shards) == 48
    again = distill_cache.config(tmp_path, f"student.checkpoint_path={folder}")
    assert train_student(again).global_step == 6


def test_a_folder_that_is_there_is_kept(config: DistillConfig, tmp_path: Path) -> None:
    destination = tmp_path / "export"
    destination.mkdir()
    (destination / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="--overwrite"):
        export_student(config, destination=destination)
    assert (destination / "mine").read_text() == "kept"
    export_student(config, destination=destination, overwrite=True)
    assert not (destination / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_ctrl_c_while_an_export_is_replaced_leaves_the_earlier_one(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = export_student(config, destination=tmp_path / "student")
    (destination / "earlier").touch()
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if target == destination and not path.name.endswith("-replaced"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_student(config, destination=destination, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert (destination / "earlier").exists()
    monkeypatch.undo()
    export_student(config, destination=destination, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert not (destination / "earlier").exists()


def test_an_older_checkpoint_can_be_exported(config: DistillConfig, tmp_path: Path) -> None:
    path = RunFolder.of(config).checkpoints().path / "step-00000002"
    folder = export_student(
        config, checkpoint=str(path), weights="raw", destination=tmp_path / "export"
    )
    expected = load_checkpoint(path).tensors["student"]
    found = pipeline_of(folder).unet.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_exported_says_why(
    distill_cache: DistillCache, trained_run: Path, tmp_path: Path, tiny_family: Family
) -> None:
    teacher = tiny_family.teachers[0]
    other = distill_cache.config(trained_run, f"student.checkpoint_path={teacher}")
    with pytest.raises(IncompatibleError, match="started from other weights"):
        export_student(other, destination=tmp_path / "export")
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        export_student(distill_cache.config(tmp_path), destination=tmp_path / "export")
    damaged = shutil.copytree(
        RunFolder.of(other).checkpoints().path / "step-00000004", tmp_path / "damaged"
    )
    (damaged / "state.json").write_text("{}")
    with pytest.raises(CorruptError, match="damaged"):
        export_student(other, checkpoint=str(damaged), destination=tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_run_without_an_average_exports_its_weights(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config = distill_cache.config(tmp_path, "training.num_steps=1", "student.use_ema=false")
    train_student(config)
    with pytest.raises(ConfigError, match="--weights raw"):
        export_student(config, weights="ema")
    assert export_student(config) == RunFolder.of(config).export


def test_a_disk_that_refuses_leaves_nothing(config: DistillConfig, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the same calls fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError):
            export_student(config, destination=tmp_path / "export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
