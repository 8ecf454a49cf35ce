"""Which shard sets may be joined: all that is refused from set records and manifests alone.

No shard and no index is opened here, so a mistake shows before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from sdxl_distill.core.noise import NOISE_ALGORITHM
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.errors import ConfigError, DistillError, IncompatibleError
from sdxl_distill.fingerprint import differing_fields
from sdxl_distill.shards.set_record import Kind, NoiseRecipe
from sdxl_distill.shards.shard_set import ShardSet


def recipe_of(predictions: ShardSet) -> NoiseRecipe:
    """Return from what the noise and timesteps of a predictions set follow."""
    recipe = predictions.manifest.record.noise
    assert recipe is not None, predictions.id
    return recipe


def noise_schedule_of(predictions: ShardSet) -> NoiseSchedule:
    """Return the noise schedule of a predictions set's teacher."""
    schedule = predictions.manifest.record.noise_schedule
    assert schedule is not None, predictions.id
    return schedule


def text_fingerprint_of(shard_set: ShardSet) -> str | None:
    """Return the fingerprint of the text encoders behind a text or predictions set."""
    return shard_set.manifest.record.content.get("text")


def holds_text(shard_set: ShardSet) -> bool:
    """Whether the records of a set hold text embeddings."""
    record = shard_set.manifest.record
    return record.kind == "text" or record.layout == "full"


def require_kind(shard_set: ShardSet, kind: Kind) -> None:
    """Refuse a set of another kind than the one that is asked for.

    Raises:
        ConfigError: when it is one.
    """
    found = shard_set.manifest.record.kind
    if found != kind:
        raise ConfigError(
            f"set {shard_set.id} is a {found} set",
            expected=f"a {kind} set",
            where=str(shard_set.directory),
            action=f"name the folder of a {kind} set",
        )


def require_distinct_ids(shard_sets: Sequence[ShardSet]) -> None:
    """Refuse two sets with one id: checkpoints, logs and caches know sets by it.

    Raises:
        IncompatibleError: naming both folders.
    """
    for other, shard_set in combinations(shard_sets, 2):
        if other.id == shard_set.id:
            raise IncompatibleError(
                f"two sets with the id {shard_set.id}",
                expected="every set once",
                where=f"{other.directory} and {shard_set.directory}",
                action="leave one of them out, or build one under another teacher_id",
            )


def require_same_question(predictions: Sequence[ShardSet]) -> None:
    """Refuse teachers that were asked about different noise, timesteps or ᾱ.

    Raises:
        IncompatibleError: naming every field that differs and both values.
    """
    first = predictions[0]
    recipe, num_timesteps = recipe_of(first), noise_schedule_of(first).num_train_timesteps
    if recipe.algorithm != NOISE_ALGORITHM:
        raise IncompatibleError(
            f"set {first.id} has noise.algorithm {recipe.algorithm!r}",
            expected=f"{NOISE_ALGORITHM!r}, the one this version knows",
            where=str(first.directory),
            action="use the version of sdxl_distill that built the set",
        )
    if recipe.max_timestep > num_timesteps:
        raise IncompatibleError(
            f"set {first.id} has max_timestep {recipe.max_timestep}",
            expected=f"at most {num_timesteps}, its teacher's training timesteps",
            where=str(first.directory),
            action="rebuild it",
        )
    for other in predictions[1:]:
        has_same_table = (
            noise_schedule_of(first).table_fingerprint()
            == noise_schedule_of(other).table_fingerprint()
        )
        _require_equal(
            _question(other, with_table=not has_same_table),
            _question(first, with_table=not has_same_table),
            other,
            first,
        )


def require_same_latents(shard_set: ShardSet, first: ShardSet, latents: ShardSet | None) -> None:
    """Refuse a set that was made from other latents.

    Args:
        shard_set: to be checked.
        first: the set whose latents are joined.
        latents: these, when they are already open.

    Raises:
        IncompatibleError: naming VAE, resolutions or whatever field of the two latents sets
            differs, where both can still be opened; else their fingerprints.
    """
    own, expected = (each.manifest.record.latents for each in (shard_set, first))
    assert own is not None and expected is not None
    if own.fingerprint == expected.fingerprint:
        return
    own_latents, first_latents = _latents_or_none(shard_set), latents or _latents_or_none(first)
    if own_latents is not None and first_latents is not None:
        _require_equal(
            {"latents": own_latents.manifest.record.content_fields()},
            {"latents": first_latents.manifest.record.content_fields()},
            shard_set,
            first,
        )
    _require_equal(
        {"latents": own.fingerprint}, {"latents": expected.fingerprint}, shard_set, first
    )


def require_same_shapes(latents: ShardSet, text: ShardSet, predictions: Sequence[ShardSet]) -> None:
    """Refuse records whose tensors do not fit together, whatever their sets claim.

    Raises:
        IncompatibleError: naming the tensor and both shapes.
    """
    latents_shape = _shapes(latents)["latents"]
    for shard_set in predictions:
        found = {"teacher_pred": _shapes(shard_set)["teacher_pred"]}
        _require_equal(found, {"teacher_pred": latents_shape}, shard_set, latents)
        if holds_text(shard_set) and text_fingerprint_of(shard_set) == text_fingerprint_of(text):
            _require_equal(_text_shapes(shard_set), _text_shapes(text), shard_set, text)


def _question(predictions: ShardSet, *, with_table: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"noise": asdict(recipe_of(predictions))}
    if with_table:
        schedule = noise_schedule_of(predictions).to_json()
        del schedule["prediction_type"]  # may differ: predictions are converted
        fields["noise_schedule"] = schedule
    return fields


def _shapes(shard_set: ShardSet) -> dict[str, list[int | str]]:
    return {spec.name: list(spec.shape) for spec in shard_set.manifest.record.schema.tensors}


def _text_shapes(shard_set: ShardSet) -> dict[str, list[int | str]]:
    shapes = _shapes(shard_set)
    return {name: shapes[name] for name in ("encoder_hidden_states", "pooled_embeds")}


def _latents_or_none(shard_set: ShardSet) -> ShardSet | None:
    """Open a set's latents only to explain how they differ."""
    try:
        return shard_set.open_referenced("latents")
    except DistillError:
        return None


def _require_equal(
    found: dict[str, Any], expected: dict[str, Any], shard_set: ShardSet, first: ShardSet
) -> None:
    differences = differing_fields(found, expected)
    if differences:
        raise IncompatibleError(
            f"set {shard_set.id} has "
            + ", ".join(f"{path} {value!r}" for path, value, _ in differences),
            expected=", ".join(f"{path} {value!r}" for path, _, value in differences)
            + f" as in set {first.id}",
            where=f"{shard_set.directory} and {first.directory}",
            action=f"rebuild one of the two with the values of the other, or leave {shard_set.id} "
            "out",
        )
