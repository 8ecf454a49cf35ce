"""The shard sets of one join: the predictions given, and the latents and text they refer to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from sdxl_distill.core.noise import NOISE_ALGORITHM
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.errors import ConfigError, DistillError, IncompatibleError
from sdxl_distill.fingerprint import differing_fields
from sdxl_distill.shards.set_identity import Kind, NoiseRecipe
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set


def recipe_of(predictions: ShardSet) -> NoiseRecipe:
    """Return the recipe that a predictions set's noise and timesteps follow from."""
    recipe = predictions.manifest.identity.noise
    assert recipe is not None, predictions.id
    return recipe


def noise_schedule_of(predictions: ShardSet) -> NoiseSchedule:
    """Return the noise schedule of a predictions set's teacher."""
    schedule = predictions.manifest.identity.noise_schedule
    assert schedule is not None, predictions.id
    return schedule


def text_fingerprint_of(shard_set: ShardSet) -> str | None:
    """Return the fingerprint of the text encoders behind a text or predictions set."""
    return shard_set.manifest.identity.content.get("text")


def holds_text(shard_set: ShardSet) -> bool:
    """Whether the records of a set hold text embeddings."""
    identity = shard_set.manifest.identity
    return identity.kind == "text" or identity.layout == "full"


def require_kind(shard_set: ShardSet, kind: Kind) -> None:
    """Refuse a set of any kind but the wanted one.

    Raises:
        ConfigError: when the set is of another kind.
    """
    found = shard_set.manifest.identity.kind
    if found != kind:
        raise ConfigError(
            f"set {shard_set.id} is a {found} set",
            expected=f"a {kind} set",
            where=str(shard_set.location),
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
                where=f"{other.location} and {shard_set.location}",
                action="leave one of them out, or build one under another teacher_id",
            )


def require_same_draws(predictions: Sequence[ShardSet]) -> None:
    """Refuse teachers that saw different noise, timesteps or ᾱ.

    Raises:
        IncompatibleError: naming every field that differs and both values.
    """
    # A recipe that this version and the teacher can follow.
    first = predictions[0]
    recipe, num_timesteps = recipe_of(first), noise_schedule_of(first).num_train_timesteps
    if recipe.algorithm != NOISE_ALGORITHM:
        raise IncompatibleError(
            f"set {first.id} has noise.algorithm {recipe.algorithm!r}",
            expected=f"{NOISE_ALGORITHM!r}, the one this version knows",
            where=str(first.location),
            action="use the version of sdxl_distill that built the set",
        )
    if recipe.max_timestep > num_timesteps:
        raise IncompatibleError(
            f"set {first.id} has max_timestep {recipe.max_timestep}",
            expected=f"at most {num_timesteps}, its teacher's training timesteps",
            where=str(first.location),
            action="rebuild it",
        )

    # The same recipe and ᾱ everywhere; noise schedules with one ᾱ table may differ otherwise.
    for other in predictions[1:]:
        has_same_table = (
            noise_schedule_of(first).table_fingerprint()
            == noise_schedule_of(other).table_fingerprint()
        )
        _require_equal(
            _draw_fields(other, with_table=not has_same_table),
            _draw_fields(first, with_table=not has_same_table),
            other,
            first,
        )


def require_same_latents(shard_set: ShardSet, first: ShardSet, latents: ShardSet | None) -> None:
    """Refuse a set that was made from other latents.

    Args:
        shard_set: the set to check.
        first: the set whose latents are joined.
        latents: the joined latents set, when it is already open.

    Raises:
        IncompatibleError: naming the fields in which the two latents sets differ (VAE,
            resolutions …) if both can still be opened, otherwise their fingerprints.
    """
    own, expected = (each.manifest.identity.latents for each in (shard_set, first))
    assert own is not None and expected is not None
    if own.fingerprint == expected.fingerprint:
        return
    own_latents, first_latents = _latents_or_none(shard_set), latents or _latents_or_none(first)
    if own_latents is not None and first_latents is not None:
        _require_equal(
            {"latents": own_latents.manifest.identity.content_fields()},
            {"latents": first_latents.manifest.identity.content_fields()},
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


def _draw_fields(predictions: ShardSet, *, with_table: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"noise": asdict(recipe_of(predictions))}
    if with_table:
        schedule = noise_schedule_of(predictions).to_json()
        del schedule["prediction_type"]  # may differ: predictions are converted
        fields["noise_schedule"] = schedule
    return fields


def _shapes(shard_set: ShardSet) -> dict[str, list[int | str]]:
    return {spec.name: list(spec.shape) for spec in shard_set.manifest.identity.schema.tensors}


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
            where=f"{shard_set.location} and {first.location}",
            action=f"rebuild one of the two with the values of the other, or leave {shard_set.id} "
            "out",
        )


@dataclass(frozen=True)
class JoinedSets:
    """Sets that belong together.

    Attributes:
        predictions: one set of each teacher.
        latents: the set that they were made from.
        text: the set whose text embeddings condition the student: a text set, or one of
            `predictions` in layout `full`.
    """

    predictions: tuple[ShardSet, ...]
    latents: ShardSet
    text: ShardSet

    @classmethod
    def resolve(
        cls,
        predictions: Sequence[ShardSet],
        *,
        latents: ShardSet | None = None,
        text: ShardSet | None = None,
        text_fingerprint: str | None = None,
    ) -> JoinedSets:
        """Find latents and text embeddings, and refuse what does not belong together.

        Args:
            predictions: one set of each teacher.
            latents: the latents set; None opens the one that the first set refers to.
            text: the text set to use; None looks in the sets of layout `full`, then at the
                places that those of layout `compact` name, then in the folders next to them.
            text_fingerprint: fingerprint of the text encoders that the student wants; None
                takes those of the first set.

        Raises:
            ConfigError: when there is no set, one is of the wrong kind, or latents or text are
                not where they should be.
            IncompatibleError: when two sets differ in what must be equal.
        """
        # One set of each teacher, all made from the same images, noise and timesteps.
        if not predictions:
            raise ConfigError("no predictions set", expected="at least one", where="join")
        for shard_set in predictions:
            require_kind(shard_set, "predictions")
        require_distinct_ids(predictions)
        require_same_draws(predictions)
        first = predictions[0]
        for shard_set in predictions[1:]:
            require_same_latents(shard_set, first, latents)

        # The latents and text that they refer to.
        latents = _latents_of(first, latents)
        wanted = text_fingerprint_of(first) if text_fingerprint is None else text_fingerprint
        if text is None:
            text = _find_text(predictions, wanted)
        else:
            _require_text(text, first, latents, wanted)

        # What holds only of all of them together.
        sets = cls(tuple(predictions), latents, text)
        require_distinct_ids(sets.all)
        require_same_shapes(latents, text, predictions)
        return sets

    @property
    def all(self) -> tuple[ShardSet, ...]:
        """Every set once: predictions, latents, and the text set where there is one."""
        own_text = () if self.text in self.predictions else (self.text,)
        return (*self.predictions, self.latents, *own_text)

    @property
    def num_draws(self) -> int:
        """The draws that all predictions sets have."""
        return min(shard_set.manifest.draws for shard_set in self.predictions)


def _latents_of(first: ShardSet, latents: ShardSet | None) -> ShardSet:
    if latents is None:
        return first.open_referenced("latents")
    require_kind(latents, "latents")
    found, expected = latents.manifest.identity.fingerprint, _latents_fingerprint(first)
    if found != expected:
        raise IncompatibleError(
            f"latents set {latents.id} has fingerprint {found[:12]}…",
            expected=f"{expected[:12]}…, the latents of set {first.id}",
            where=f"{latents.location} and {first.location}",
            action="name the latents set that the predictions were made from",
        )
    return latents


def _require_text(text: ShardSet, first: ShardSet, latents: ShardSet, wanted: str | None) -> None:
    require_kind(text, "text")
    require_same_latents(text, first, latents)
    found = text_fingerprint_of(text)
    if found != wanted:
        raise IncompatibleError(
            f"text set {text.id} has text {found}",
            expected=f"{wanted}, the text encoders that the student wants",
            where=str(text.location),
            action="name the text set of the student's text encoders",
        )


def _find_text(predictions: Sequence[ShardSet], wanted: str | None) -> ShardSet:
    """Return the first set with the embeddings that are wanted."""
    matching = [each for each in predictions if text_fingerprint_of(each) == wanted]
    for shard_set in matching:
        if holds_text(shard_set):
            return shard_set
    if matching:
        return matching[0].open_referenced("text")
    latents = _latents_fingerprint(predictions[0])
    for text in _neighbouring_text_sets(predictions):
        if text_fingerprint_of(text) == wanted and _latents_fingerprint(text) == latents:
            return text
    held = ", ".join(f"{each.id} has {text_fingerprint_of(each)}" for each in predictions)
    raise IncompatibleError(
        f"no set holds the embeddings of the student's text encoders ({held})",
        expected=f"text {wanted}",
        where=", ".join(str(each.location) for each in predictions),
        action="set student.text_encoder_id to the teachers' model.text_encoder_id (needed after "
        "an export with rounded text encoders); only to condition the student on other encoders, "
        "build their text set: python tools/build_text.py --config <the teachers' configuration> "
        "--set model.text_encoder_id=<the student's text_encoder_id>",
    )


def _latents_fingerprint(shard_set: ShardSet) -> str:
    reference = shard_set.manifest.identity.latents
    assert reference is not None, shard_set.id
    return reference.fingerprint


def _neighbouring_text_sets(predictions: Sequence[ShardSet]) -> Iterator[ShardSet]:
    """Yield the complete text sets in the folders that hold the predictions sets."""
    for parent in sorted({each.location.parent for each in predictions}):
        for name in parent.folders():
            if name.startswith("text-"):
                with suppress(DistillError):
                    yield open_shard_set(parent / name)
