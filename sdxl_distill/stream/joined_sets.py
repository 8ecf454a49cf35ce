"""The shard sets of one join: the predictions given, and the latents and text they refer to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sdxl_distill.errors import ConfigError, DistillError, IncompatibleError
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.stream.compatibility import (
    holds_text,
    require_distinct_ids,
    require_kind,
    require_same_latents,
    require_same_question,
    require_same_shapes,
    text_fingerprint_of,
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
            latents: None opens it where the first set says that it lies.
            text: the text set to use; None looks in the sets of layout `full`, at the places
                that those of layout `compact` name, and beside them.
            text_fingerprint: of the text encoders that the student wants; None takes those of
                the first set.

        Raises:
            ConfigError: when there is no set, one is of the wrong kind, or latents or text are
                not where they should be.
            IncompatibleError: when two sets differ in what must be equal.
        """
        if not predictions:
            raise ConfigError("no predictions set", expected="at least one", where="join")
        for shard_set in predictions:
            require_kind(shard_set, "predictions")
        require_distinct_ids(predictions)
        require_same_question(predictions)
        first = predictions[0]
        for shard_set in predictions[1:]:
            require_same_latents(shard_set, first, latents)
        latents = _latents_of(first, latents)
        wanted = text_fingerprint_of(first) if text_fingerprint is None else text_fingerprint
        if text is None:
            text = _find_text(predictions, wanted)
        else:
            _require_text(text, first, latents, wanted)
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
    found, expected = latents.manifest.record.fingerprint, _latents_fingerprint(first)
    if found != expected:
        raise IncompatibleError(
            f"latents set {latents.id} has fingerprint {found[:12]}…",
            expected=f"{expected[:12]}…, the latents of set {first.id}",
            where=f"{latents.directory} and {first.directory}",
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
            where=str(text.directory),
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
    for text in _text_sets_beside(predictions):
        if text_fingerprint_of(text) == wanted and _latents_fingerprint(text) == latents:
            return text
    held = ", ".join(f"{each.id} has {text_fingerprint_of(each)}" for each in predictions)
    raise IncompatibleError(
        f"no set holds the embeddings of the student's text encoders ({held})",
        expected=f"text {wanted}",
        where=", ".join(str(each.directory) for each in predictions),
        action="set student.text_encoder_id to the checkpoint whose text encoders the teachers "
        "were asked with, their model.text_encoder_id, as an export with rounded encoders needs; "
        "only to condition the student on other encoders, build their text set: python "
        "tools/build_text.py --config <the teachers' configuration> "
        "--set model.text_encoder_id=<the student's text_encoder_id>",
    )


def _latents_fingerprint(shard_set: ShardSet) -> str:
    reference = shard_set.manifest.record.latents
    assert reference is not None, shard_set.id
    return reference.fingerprint


def _text_sets_beside(predictions: Sequence[ShardSet]) -> Iterator[ShardSet]:
    """Yield the complete text sets in the folders that hold the predictions sets."""
    for folder in sorted({each.directory.parent for each in predictions}):
        for directory in sorted(folder.glob("text-*")):
            with suppress(DistillError):
                yield open_shard_set(directory)
