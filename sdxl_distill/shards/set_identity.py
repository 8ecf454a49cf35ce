"""`set.json`: what determines the content of a shard set, written before its first shard.

Create-only: another configuration on the same folder meets it and is refused, with the fields
that differ. Its fingerprint is in every record, so that a tar proves which set it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.fingerprint import differing_fields, fingerprint
from sdxl_distill.limits import MAX_COUNTER, MAX_SET_IDENTITY_BYTES, MAX_TIMESTEPS
from sdxl_distill.shards.bounded_json import (
    SET_FORMAT_VERSION,
    Legal,
    require_legal,
    require_names,
    seal,
    shown,
    unseal,
)
from sdxl_distill.shards.record import (
    Layout,
    RecordSchema,
    latents_schema,
    predictions_schema,
    text_schema,
)
from sdxl_distill.shards.shard_name import is_safe_set_id
from sdxl_distill.storage.location import Location

_MAX_LEADING_PARENTS: Final = 3
_MAX_PARTS: Final = 32
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# Half a surrogate pair is safe only where it stands for a byte that is not UTF-8 (PEP 383).
_SAFE_PART: Final = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]{1,255}")


@dataclass(frozen=True)
class SetReference:
    """Another set that this one was made from, and where it lay relative to this one.

    Attributes:
        fingerprint: the fingerprint of that set.
        place: a relative path with `/`, at most three leading `..`; None when there is no such
            path. A hint: it is outside the fingerprint, and what lies there must match.
    """

    fingerprint: str
    place: str | None = None

    @classmethod
    def between(cls, target_fingerprint: str, own: Location, target: Location) -> SetReference:
        """Refer to the set in the folder `target` from the set in the folder `own`."""
        place = target.seen_from(own)
        return cls(target_fingerprint, place if is_safe_place(place) else None)

    def resolve(self, own: Location) -> Location | None:
        """Return the folder referred to by the set in the folder `own`."""
        return None if self.place is None else own / self.place


def parse_reference(value: Any, where: str, name: str = "reference") -> SetReference | None:
    """Read a reference that may come from a stranger; None stays None.

    Args:
        value: the JSON value.
        where: the file, for messages.
        name: the field that holds it, for messages.

    Raises:
        CorruptError: when its fields are not a fingerprint and a safe place.
    """
    if value is None:
        return None
    fields = require_names(value, {"fingerprint", "place"}, where)
    require_legal(fields, _LEGAL_REFERENCE, where, f"{name}.")
    return SetReference(**fields)


def is_safe_place(place: str) -> bool:
    """Whether a relative path climbs at most three folders and then only descends."""
    parts = place.split("/")
    num_parents = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    names = parts[num_parents:]
    return (
        num_parents <= _MAX_LEADING_PARENTS
        and len(names) <= _MAX_PARTS
        and all(_SAFE_PART.fullmatch(name) for name in names)
    )


def is_sha256(value: Any) -> bool:
    """Whether a JSON value is 64 hex digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


Kind: TypeAlias = Literal["latents", "text", "predictions"]

SET_IDENTITY_NAME: Final = "set.json"
FIELDS: Final = frozenset(
    {
        "content",
        "fingerprint",
        "format_version",
        "generation",
        "id",
        "kind",
        "latents",
        "layout",
        "noise",
        "noise_schedule",
        "schema",
        "text",
    }
)
REBUILDING: Final[Mapping[Kind, str]] = {
    "latents": "build it again: build_latents --rebuild",
    "text": "move its folder away and build it again: build_text",
    "predictions": "build it again: build_shards --set cache.skip_existing=false",
}
"""How a user replaces a whole set, for messages."""
_PLACES: Final[Mapping[Kind, str]] = {
    "latents": "data.latent_cache.cache_dir",
    "text": "cache.output_dir",
    "predictions": "teacher.teacher_id or cache.output_dir",
}


@dataclass(frozen=True)
class NoiseRecipe:
    """What a record's noise and timestep follow from: see core/noise.py."""

    algorithm: str
    base_seed: int
    min_timestep: int
    max_timestep: int


@dataclass(frozen=True)
class SetIdentity:
    """The identity of one shard set.

    Attributes:
        kind: latents, text or predictions.
        id: the set's name, which its folder has and its shards' names begin with.
        schema: the tensors of every record.
        content: whatever else determines content, as plain JSON: the models' fingerprints,
            dtypes, `cache.version`, …; never a path, batch size, device or catalog.
        layout: the layout of a predictions set's records; None for other kinds.
        noise: the recipe of a predictions set's noise and timesteps; None for other kinds.
        noise_schedule: the schedule of a predictions set's teacher; None for other kinds.
        latents: the latents set of a text or predictions set; else None.
        text: the text set of a predictions set in layout `compact`; else None.
        generation: the number of times the set was withdrawn where no folder can be renamed;
            else 0.
    """

    kind: Kind
    id: str
    schema: RecordSchema
    content: Mapping[str, Any] = field(default_factory=dict[str, Any])
    layout: Layout | None = None
    noise: NoiseRecipe | None = None
    noise_schedule: NoiseSchedule | None = None
    latents: SetReference | None = None
    text: SetReference | None = None
    generation: int = 0

    def content_fields(self) -> dict[str, Any]:
        """Return every field that determines content: exactly what the fingerprint covers."""
        return {
            "format_version": SET_FORMAT_VERSION,
            "kind": self.kind,
            "schema": self.schema.to_json(),
            "content": dict(self.content),
            "layout": self.layout,
            "noise": None if self.noise is None else asdict(self.noise),
            "noise_schedule": (
                None if self.noise_schedule is None else self.noise_schedule.to_json()
            ),
            "latents": None if self.latents is None else self.latents.fingerprint,
            "text": None if self.text is None else self.text.fingerprint,
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of `content_fields`, 64 hex digits."""
        return fingerprint(self.content_fields())

    def require_same(self, found: SetIdentity, where: str) -> None:
        """Check that the identity `found` in a folder is that of the set to be built.

        Raises:
            IncompatibleError: naming every field that differs, with both values.
        """
        expected = {**self.content_fields(), "id": self.id}
        differences = differing_fields({**found.content_fields(), "id": found.id}, expected)
        if differences:
            fields = ", ".join(f"{path} {old!r}, not {new!r}" for path, old, new in differences)
            raise IncompatibleError(
                f"the set there was built with {fields}",
                where=where,
                action=f"choose another {_PLACES[self.kind]}, or {REBUILDING[self.kind]}",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `set.json`, which a manifest repeats."""
        return {
            **self.content_fields(),
            "fingerprint": self.fingerprint,
            "generation": self.generation,
            "id": self.id,
            "latents": None if self.latents is None else asdict(self.latents),
            "text": None if self.text is None else asdict(self.text),
        }

    def to_bytes(self) -> bytes:
        """Return the content of `set.json`."""
        return seal(self.to_json())

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> SetIdentity:
        """Read the content of `set.json`.

        Raises:
            CorruptError: when it is not byte for byte what `to_bytes` writes.
            IncompatibleError: when a newer version wrote it.
        """
        return cls.from_json(unseal(content, where, MAX_SET_IDENTITY_BYTES), where)

    @classmethod
    def from_json(cls, value: Any, where: str) -> SetIdentity:
        """Build from what `to_json` returned; it may come from a stranger.

        Raises:
            CorruptError: for a missing, unknown or illegal field, or another fingerprint than
                the fields have.
        """
        fields = require_names(value, set(FIELDS), where)
        require_legal(fields, _LEGAL_FIELDS, where)
        # Each field by itself, then all of them together.
        identity = cls(
            kind=fields["kind"],
            id=fields["id"],
            schema=RecordSchema.from_json(fields["schema"], where),
            content=cast("dict[str, Any]", fields["content"]),
            layout=fields["layout"],
            noise=_parse_recipe(fields["noise"], where),
            noise_schedule=_parse_schedule(fields["noise_schedule"], where),
            latents=parse_reference(fields["latents"], where, "latents"),
            text=parse_reference(fields["text"], where, "text"),
            generation=fields["generation"],
        )
        _require_fields_of_its_kind(fields, where)
        _require_tensors_of_its_kind(identity, where)
        if fields["fingerprint"] != identity.fingerprint:
            raise CorruptError(
                f"fingerprint is {shown(fields['fingerprint'])}",
                expected=f"{identity.fingerprint}, that of the other fields",
                where=where,
            )
        return identity


def is_counter(value: Any) -> bool:
    """Whether a JSON value is a whole number from 0 to 2⁵³."""
    return type(value) is int and 0 <= value <= MAX_COUNTER


def _is_timestep(value: Any) -> bool:
    return is_counter(value) and value <= MAX_TIMESTEPS


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1  # nor NaN or infinity


def _is_place(value: Any) -> bool:
    return value is None or (isinstance(value, str) and is_safe_place(value))


_LEGAL_FIELDS: Final[Legal] = {
    "kind": (lambda value: value in get_args(Kind), " | ".join(get_args(Kind))),
    "layout": (lambda value: value in (None, *get_args(Layout)), "full | compact | null"),
    "id": (lambda value: isinstance(value, str) and is_safe_set_id(value), "the name of a set"),
    "content": (lambda value: isinstance(value, dict), "an object"),
    "generation": (is_counter, "a whole number from 0 to 2⁵³"),
}
_LEGAL_REFERENCE: Final[Legal] = {
    "fingerprint": (is_sha256, "64 hex digits"),
    "place": (_is_place, "a relative path with at most three leading .., or null"),
}
_LEGAL_RECIPE: Final[Legal] = {
    "algorithm": (lambda value: isinstance(value, str), "a name"),
    "base_seed": (lambda value: type(value) is int, "a whole number"),
    "min_timestep": (_is_timestep, f"a whole number from 0 to {MAX_TIMESTEPS}"),
    "max_timestep": (_is_timestep, f"a whole number from 0 to {MAX_TIMESTEPS}"),
}
_LEGAL_SCHEDULE: Final[Legal] = {
    "beta_start": (_is_beta, "a number from 0 to less than 1"),
    "beta_end": (_is_beta, "a number from 0 to less than 1"),
    "num_train_timesteps": (_is_timestep, f"a whole number from 0 to {MAX_TIMESTEPS}"),
    "zero_terminal_snr": (lambda value: type(value) is bool, "true or false"),
}


def _require_fields_of_its_kind(fields: Mapping[str, Any], where: str) -> None:
    """Refuse the first field that is null but needed in a set of this kind, or the reverse."""
    kind, layout = fields["kind"], fields["layout"]
    is_predictions = kind == "predictions"
    has_value = {
        "layout": is_predictions,
        "noise": is_predictions,
        "noise_schedule": is_predictions,
        "latents": kind != "latents",
        "text": is_predictions and layout == "compact",
    }
    for name, is_expected in has_value.items():
        if (fields[name] is not None) != is_expected:
            owner = f"{layout} {kind}" if is_predictions and layout else kind
            raise CorruptError(
                f"{name} is {shown(fields[name])}",
                expected=f"{'a value' if is_expected else 'null'} in a {owner} set",
                where=where,
            )


def _require_tensors_of_its_kind(identity: SetIdentity, where: str) -> None:
    """Refuse a schema that lacks a tensor of its kind, or has it with another form."""
    specs = {spec.name: spec for spec in identity.schema.tensors}
    try:
        required = _required_schema(identity)
    except KeyError as error:
        raise CorruptError(
            f"schema has no tensor {error.args[0]}",
            expected=f"the tensors of a {identity.kind} set, see docs/format.md",
            where=where,
        ) from error
    for spec in required.tensors:
        found = specs.get(spec.name)
        if found != spec:
            raise CorruptError(
                f"schema has no tensor {spec.name}"
                if found is None
                else f"schema has tensor {spec.name} as {found.dtype} {list(found.shape)}",
                expected=f"{spec.dtype} {list(spec.shape)} in a {identity.kind} set",
                where=where,
            )


def _required_schema(identity: SetIdentity) -> RecordSchema:
    """Return the schema of the set's kind with the lengths that its own schema gives.

    Raises:
        KeyError: naming the tensor that should give a length and is missing.
    """
    specs = {spec.name: spec for spec in identity.schema.tensors}
    lengths = {name: cast("tuple[int, ...]", spec.shape) for name, spec in specs.items()}
    if identity.kind == "latents":
        return latents_schema(lengths["latents"][0])
    if identity.layout == "compact":
        channels, dtype = lengths["teacher_pred"][0], specs["teacher_pred"].dtype
        return predictions_schema("compact", dtype, channels, 0, 0, 0)
    num_tokens, hidden_size = lengths["encoder_hidden_states"]
    (pooled_size,) = lengths["pooled_embeds"]
    if identity.kind == "text":
        return text_schema(num_tokens, hidden_size, pooled_size)
    channels, dtype = lengths["teacher_pred"][0], specs["teacher_pred"].dtype
    return predictions_schema("full", dtype, channels, num_tokens, hidden_size, pooled_size)


def _parse_recipe(value: Any, where: str) -> NoiseRecipe | None:
    if value is None:
        return None
    fields = require_names(value, set(NoiseRecipe.__dataclass_fields__), where)
    require_legal(fields, _LEGAL_RECIPE, where, "noise.")
    recipe = NoiseRecipe(**fields)
    if recipe.min_timestep >= recipe.max_timestep:
        raise CorruptError(
            f"noise.min_timestep is {recipe.min_timestep}",
            expected=f"less than max_timestep, which is {recipe.max_timestep}",
            where=where,
        )
    return recipe


def _parse_schedule(value: Any, where: str) -> NoiseSchedule | None:
    if value is None:
        return None
    fields = require_names(value, set(NoiseSchedule.__dataclass_fields__), where)
    require_legal(fields, _LEGAL_SCHEDULE, where, "noise_schedule.")
    return NoiseSchedule.from_json(fields)
