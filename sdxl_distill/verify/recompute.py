"""Runs random records of a predictions set through their teacher again and compares.

Digests prove that bytes are unchanged since they were written; this proves that they were right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
import torch

from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.fingerprint import differing_fields
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.runtime.device import resolve_device
from sdxl_distill.sets.predictions_content import Teacher, TeacherInput, read_teacher_input
from sdxl_distill.sets.predictions_set import load_teacher
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.verify.finding import Finding, FindingList

MAX_DIFFERENCE_FP32: Final = 5e-3
MAX_DIFFERENCE_BF16: Final = 3e-2
_ACTION: Final = "rebuild the set with cache.skip_existing: false"


class Recomputation(NamedTuple):
    """The result of the comparison.

    Attributes:
        num_records: the number of records that were computed again.
        largest_difference: the largest relative difference among them.
        findings: empty when all are within the bound.
    """

    num_records: int
    largest_difference: float
    findings: list[Finding]


def recompute_records(
    config: BuilderConfig,
    predictions: ShardSet,
    num_records: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Recomputation:
    """Compute some predictions of a set again and compare them with what is stored.

    The relative difference ‖stored − fresh‖ / ‖fresh‖ may be 5e-3 for a teacher that runs in
    float32 and 3e-2 in bfloat16: other devices and batch sizes round differently.

    Args:
        config: the configuration that the set was built with.
        predictions: the set.
        num_records: the largest number of records; they are drawn at random, none twice.
        seed: the seed of that choice.
        on_progress: a function that is called with the numbers of records done and of all.

    Raises:
        ConfigError: when the set is not a predictions set, or its latents or text are missing.
        IncompatibleError: when the configuration describes a teacher that is not the set's.
        CorruptError, StorageError: when the checkpoint or a sibling cannot be read.
    """
    identity = predictions.manifest.identity
    if identity.kind != "predictions":
        raise ConfigError(
            f"set {predictions.id} is a {identity.kind} set",
            expected="a predictions set, to be computed again by its teacher",
            where=str(predictions.location),
            action="leave out --recompute, or name a teacher's folder",
        )
    # Open the teacher and its inputs; in layout `full` a set is its own text set.
    checkpoint = ModelFolder.resolve(config.teacher.checkpoint_path)
    _require_same_teacher(config, checkpoint, predictions)
    latents = predictions.open_referenced("latents", config.data.latent_cache.cache_dir)
    text = predictions if identity.text is None else predictions.open_referenced("text")
    assert identity.noise_schedule is not None
    device = resolve_device(config.device, 0)
    teacher = load_teacher(config, checkpoint, identity.noise_schedule, device)
    asked = _Asked(predictions, latents, text, replace(teacher, dtype=torch.float32))
    # Ask it again for each record that was drawn.
    bound = MAX_DIFFERENCE_BF16 if config.teacher.use_bf16 else MAX_DIFFERENCE_FP32
    chosen = choose_records(predictions.manifest, num_records, seed)
    findings: list[Finding] = []
    largest = 0.0
    for num_done, (name, number) in enumerate(chosen, 1):
        found = FindingList(predictions.id, name.tar)
        with found.collecting(predictions.index(name).key(number)):
            difference = asked.difference(name, number)
            largest = max(largest, difference)
            if not difference <= bound:
                raise CorruptError(
                    f"teacher_pred differs by {difference:.2%} from the teacher's answer",
                    expected=f"at most {bound:.1%}",
                    action=_ACTION,
                )
        findings += found.all()
        on_progress(num_done, len(chosen))
    return Recomputation(len(chosen), largest, findings)


def choose_records(manifest: Manifest, num_records: int, seed: int) -> list[tuple[ShardName, int]]:
    """Return the shard and number of some records of a set: at random, sorted, none twice."""
    ends = np.cumsum([entry.num_records for entry in manifest.shards])
    total = manifest.num_records
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(total, min(num_records, total), replace=False))
    rows = np.searchsorted(ends, chosen, side="right")
    names = manifest.names()
    return [
        (names[row], int(record - ends[row] + manifest.shards[row].num_records))
        for row, record in zip(rows, chosen, strict=True)
    ]


def _require_same_teacher(
    config: BuilderConfig, checkpoint: ModelFolder, predictions: ShardSet
) -> None:
    identity = predictions.manifest.identity
    assert identity.noise_schedule is not None
    teacher = config.teacher
    found = {
        "teacher": checkpoint.unet_fingerprint(),
        "use_bf16": teacher.use_bf16,
        "noise_schedule": checkpoint.noise_schedule(
            teacher.prediction_type, teacher.zero_terminal_snr
        ).to_json(),
    }
    expected = {name: identity.content.get(name) for name in ("teacher", "use_bf16")}
    expected["noise_schedule"] = identity.noise_schedule.to_json()
    differences = differing_fields(found, expected)
    if differences:
        raise IncompatibleError(
            "the configuration describes another teacher: "
            + ", ".join(f"{path} {value!r}" for path, value, _ in differences),
            expected=", ".join(f"{path} {value!r}" for path, _, value in differences)
            + f" as set {predictions.id} was built with",
            where=teacher.checkpoint_path,
            action="name the configuration that built the set",
        )


class _Asked(NamedTuple):
    """A predictions set with its siblings, and its teacher to be asked again."""

    predictions: ShardSet
    latents: ShardSet
    text: ShardSet
    teacher: Teacher

    def difference(self, name: ShardName, number: int) -> float:
        """Return ‖stored − fresh‖ / ‖fresh‖ of one prediction.

        Raises:
            CorruptError: when the record is damaged, or its inputs are not what they should be.
            IncompatibleError: when the latents shard holds other keys.
            NumericalError: when the teacher answers NaN.
        """
        recipe = self.predictions.manifest.identity.noise
        assert recipe is not None
        reader = self.predictions.reader(name)
        teacher_input = read_teacher_input(self.latents, self.text, recipe, name, [number])
        if teacher_input.keys != [reader.index.key(number)]:
            raise IncompatibleError(
                "the latents shard has another key at this place",
                expected="the same keys in the same order",
                action="verify with --against and the folder of the latents set",
            )
        stored = reader.read_record(number)
        _require_same_input(stored, teacher_input)
        fresh = self.teacher.predict(teacher_input)[0]
        norm = torch.linalg.vector_norm
        return float(norm(stored["teacher_pred"].to(torch.float32) - fresh) / norm(fresh))


def _require_same_input(stored: dict[str, torch.Tensor], teacher_input: TeacherInput) -> None:
    asked = {
        "seed": teacher_input.seeds,
        "timestep": teacher_input.timesteps,
        "noise": teacher_input.noise[0],
        "encoder_hidden_states": teacher_input.encoder_hidden_states[0],
        "pooled_embeds": teacher_input.pooled_embeds[0],
    }
    wrong = [name for name in asked.keys() & stored if not torch.equal(stored[name], asked[name])]
    if wrong:
        raise CorruptError(
            f"{', '.join(sorted(wrong))} are not what the teacher is asked for this image",
            expected="what follows from the image's id and its caption",
            action=_ACTION,
        )
