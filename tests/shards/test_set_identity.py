"""The set record: what the fingerprint covers, what a stranger may not say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.shards.bounded_json import seal
from sdxl_distill.shards.record import (
    RecordSchema,
    TensorSpec,
    latents_schema,
    predictions_schema,
)
from sdxl_distill.shards.set_identity import SetIdentity, SetReference, is_safe_place
from sdxl_distill.storage.location import Location

KINDS = [("latents", "full"), ("text", "full"), ("predictions", "full"), ("predictions", "compact")]


@pytest.fixture(params=KINDS, ids=str)
def identity(request, sets) -> SetIdentity:
    return sets.start(*request.param).identity


@pytest.fixture
def predictions(sets) -> SetIdentity:
    return sets.start().identity


def test_a_record_is_read_back(identity: SetIdentity) -> None:
    assert SetIdentity.from_bytes(identity.to_bytes(), "x") == identity


def test_every_flipped_byte_is_refused(identity: SetIdentity) -> None:
    content = identity.to_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x01
        with pytest.raises(CorruptError):
            SetIdentity.from_bytes(bytes(flipped), "x")


CONTENT_CHANGES: dict[str, Any] = {
    "schema": predictions_schema("full", "BF16", 4, 3, 4, 5),
    "content": {"teacher": "4" * 64, "version": "1"},
    "noise_schedule": NoiseSchedule(zero_terminal_snr=True),
    "latents": SetReference("9" * 64, "../latents"),
}


@pytest.mark.parametrize("field", CONTENT_CHANGES)
def test_the_fingerprint_covers_what_determines_content(
    field: str, predictions: SetIdentity
) -> None:
    other = replace(predictions, **{field: CONTENT_CHANGES[field]})
    assert other.fingerprint != predictions.fingerprint


@pytest.mark.parametrize(
    "change",
    [{"id": "b"}, {"generation": 4}, {"latents": SetReference("1" * 64, "../../elsewhere")}],
    ids=str,
)
def test_the_fingerprint_does_not_cover_names_and_places(
    change: dict, predictions: SetIdentity
) -> None:
    assert replace(predictions, **change).fingerprint == predictions.fingerprint


def test_another_configuration_is_refused_with_the_fields_that_differ(
    predictions: SetIdentity,
) -> None:
    found = replace(
        predictions,
        content={"teacher": "3" * 64, "version": "2"},
        noise=replace(predictions.noise, base_seed=7),  # type: ignore[type-var]
    )
    with pytest.raises(IncompatibleError) as caught:
        predictions.require_same(found, "cache/teacher.v1")
    assert "content.version '2', not '1'" in caught.value.found
    assert "noise.base_seed 7, not 42" in caught.value.found
    assert "teacher" not in caught.value.found
    assert "cache.skip_existing=false" in str(caught.value)


def test_another_latents_set_is_refused_with_the_command_that_builds_it_anew() -> None:
    vae, other = (
        SetIdentity("latents", "latents", latents_schema(4), {"vae": each}) for each in "ab"
    )
    with pytest.raises(IncompatibleError, match="build_latents --rebuild"):
        vae.require_same(other, "cache/latents")


def test_the_same_configuration_from_another_place_is_accepted(predictions: SetIdentity) -> None:
    moved = replace(predictions, latents=SetReference("1" * 64, None))
    predictions.require_same(moved, "x")


def signed(identity: SetIdentity, change: dict[str, Any]) -> bytes:
    """Encode a record with fields changed and the fingerprint that its fields then have."""
    fields = identity.to_json() | change
    covered = {**identity.content_fields(), **change}
    for name in ("latents", "text"):
        if isinstance(covered[name], dict):
            covered[name] = covered[name].get("fingerprint")
    covered = {name: covered[name] for name in identity.content_fields()}
    if "fingerprint" not in change:
        fields["fingerprint"] = fingerprint(covered)
    return seal(fields)


def test_the_forger_of_these_tests_can_sign(predictions: SetIdentity) -> None:
    assert SetIdentity.from_bytes(signed(predictions, {"content": {}}), "x").content == {}


SCHEMA = predictions_schema("full", "F16", 4, 3, 4, 5)
LIES: list[dict[str, Any]] = [
    {"kind": "images"},
    {"kind": []},
    {"kind": "latents"},
    {"id": "../up"},
    {"id": 7},
    {"layout": "wide"},
    {"layout": None},
    {"layout": "compact"},
    {"content": []},
    {"generation": -1},
    {"generation": True},
    {"generation": 1 << 60},
    {"fingerprint": "0" * 64},
    {"noise": None},
    {"noise": {"algorithm": "a", "base_seed": 1, "min_timestep": 5, "max_timestep": 5}},
    {"noise": {"algorithm": 1, "base_seed": 1, "min_timestep": 0, "max_timestep": 5}},
    {"noise": {"algorithm": "a", "base_seed": 1, "min_timestep": 0, "max_timestep": 10**9}},
    {"noise": {"algorithm": "a"}},
    {"noise_schedule": None},
    {"noise_schedule": NoiseSchedule().to_json() | {"num_train_timesteps": 10**12}},
    {"noise_schedule": NoiseSchedule().to_json() | {"num_train_timesteps": "many"}},
    {"noise_schedule": NoiseSchedule().to_json() | {"beta_start": "0.1"}},
    {"noise_schedule": NoiseSchedule().to_json() | {"beta_end": 2}},
    {"noise_schedule": NoiseSchedule().to_json() | {"zero_terminal_snr": 1}},
    {"noise_schedule": NoiseSchedule().to_json() | {"extra": 1}},
    {"latents": None},
    {"latents": {"fingerprint": "1" * 64, "place": "../../../../etc"}},
    {"latents": {"fingerprint": "1" * 63, "place": "../latents"}},
    {"latents": {"fingerprint": "1" * 64}},
    {"text": {"fingerprint": "1" * 64, "place": None}},
    {"schema": RecordSchema(SCHEMA.tensors[1:]).to_json()},
    {"schema": RecordSchema((TensorSpec("seed", "I64", (2,)), *SCHEMA.tensors[3:])).to_json()},
]


@pytest.mark.parametrize("change", LIES, ids=lambda change: str(change)[:70])
def test_a_record_that_lies_with_a_right_fingerprint_is_refused(
    change: dict[str, Any], predictions: SetIdentity
) -> None:
    with pytest.raises(CorruptError):
        SetIdentity.from_bytes(signed(predictions, change), "x")


def test_an_unknown_prediction_type_is_refused(predictions: SetIdentity) -> None:
    schedule = NoiseSchedule().to_json() | {"prediction_type": "flow"}
    with pytest.raises(IncompatibleError, match="flow"):
        SetIdentity.from_bytes(signed(predictions, {"noise_schedule": schedule}), "x")


def test_unknown_and_missing_fields_are_refused(predictions: SetIdentity) -> None:
    fields = predictions.to_json()
    for changed in ({**fields, "host": "node7"}, {"id": fields["id"]}):
        with pytest.raises(CorruptError):
            SetIdentity.from_bytes(seal(changed), "x")


def test_an_optional_tensor_of_a_later_version_is_accepted(predictions: SetIdentity) -> None:
    schema = RecordSchema((*SCHEMA.tensors, TensorSpec("mask", "F16", (1, "H/8", "W/8"))))
    record = replace(predictions, schema=schema)
    assert SetIdentity.from_bytes(record.to_bytes(), "x") == record


def test_a_newer_version_asks_for_a_newer_program(predictions: SetIdentity) -> None:
    content = seal(predictions.to_json() | {"format_version": 2, "novelty": True})
    with pytest.raises(IncompatibleError, match="format version 2"):
        SetIdentity.from_bytes(content, "x")


@pytest.mark.parametrize(
    ("place", "is_safe"),
    [
        ("../latents", True),
        ("../../../mein Vorrat/.cache/latents", True),
        ("latents", True),
        ("../../../../latents", False),
        ("../a/../../../../b", False),
        ("a/../b", False),
        ("/etc", False),
        ("", False),
        (".", False),
        ("../", False),
        ("..//a", False),
        ("a\x00b", False),
        ("a\nb", False),
        ("..\\a", False),
        ("/".join("a" * 33), False),
    ],
)
def test_a_place_climbs_three_folders_at_most(place: str, is_safe: bool) -> None:
    assert is_safe_place(place) == is_safe


def test_a_reference_finds_its_set_again(tmp_path: Path) -> None:
    predictions, latents = tmp_path / "predictions/teacher", tmp_path / "latents"
    reference = SetReference.between("1" * 64, Location(predictions), Location(latents))
    assert reference.place == "../../latents"
    resolved = reference.resolve(Location(predictions))
    assert resolved is not None
    assert resolved.real() == Location(latents).real()


def test_a_set_too_far_away_gets_no_place(tmp_path: Path) -> None:
    own, latents = Location(tmp_path / "a/b/c/d"), Location(tmp_path / "latents")
    reference = SetReference.between("1" * 64, own, latents)
    assert reference == SetReference("1" * 64, None)
    assert reference.resolve(Location(tmp_path)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pictures"}, r"kind is 'pictures'; expected latents \| text \| predictions"),
        ({"generation": -1}, r"generation is -1; expected a whole number"),
        ({"content": ["x" * 200]}, r"content is \['x{70,80}; expected an object"),
        ({"noise": {"base_seed": "7"}}, r"noise.base_seed is '7'; expected a whole number"),
        (
            {"noise": {"min_timestep": 900, "max_timestep": 3}},
            r"noise.min_timestep is 900; expected less than max_timestep, which is 3",
        ),
        (
            {"noise_schedule": {"beta_end": 1.5}},
            r"noise_schedule.beta_end is 1\.5; expected a number from 0 to less than 1",
        ),
        (
            {"latents": {"place": "../../../../etc"}},
            r"latents.place is '(\.\./){4}etc'; expected a relative path with at most three",
        ),
        (
            {"latents": {"fingerprint": "1" * 63}},
            r"latents.fingerprint is '1{63}'; expected 64 hex",
        ),
        ({"kind": "latents"}, r"layout is 'full'; expected null in a latents set"),
        ({"noise": None}, r"noise is None; expected a value in a full predictions set"),
        ({"layout": "compact"}, r"text is None; expected a value in a compact predictions set"),
        (
            {"text": {"fingerprint": "1" * 64, "place": None}},
            r"text is \{.{70,80}; expected null in a full predictions set",
        ),
        (
            {"schema": RecordSchema(SCHEMA.tensors[1:]).to_json()},
            r"schema has no tensor teacher_pred; expected the tensors of a predictions set",
        ),
        (
            {"schema": RecordSchema((SCHEMA.tensors[0], *SCHEMA.tensors[2:])).to_json()},
            r"schema has no tensor timestep; expected I64 \[1\] in a predictions set",
        ),
        (
            {"schema": [{"name": "a", "dtype": "F8" * 99, "shape": [1]}]},
            r"schema has tensor a with dtype '(F8){39}F; expected F16",
        ),
        (
            {"schema": [{"name": "a", "dtype": "F16", "shape": [1 << 60]}]},
            r"schema has tensor a with shape \[1152921504606846976\]; expected 1 to 4 lengths",
        ),
        ({"fingerprint": "0" * 64}, r"fingerprint is '0{64}'; expected [0-9a-f]{64}, that of"),
    ],
)
def test_an_illegal_field_is_named_with_its_value(
    changes: dict[str, Any], message: str, predictions: SetIdentity
) -> None:
    fields = predictions.to_json()
    for name, value in changes.items():
        inner = fields[name]
        is_part = isinstance(value, dict) and isinstance(inner, dict)
        fields[name] = {**inner, **value} if is_part else value
    with pytest.raises(CorruptError, match=f"^set.json: {message}"):
        SetIdentity.from_json(fields, "set.json")
