"""Manifests: a function of their inputs; everything a stranger may write is bounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.shards import bounded_json
from sdxl_distill.shards.bounded_json import seal
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.shard_name import ShardName

KINDS = [("latents", "full"), ("text", "full"), ("predictions", "full"), ("predictions", "compact")]


@pytest.fixture
def manifest(sets) -> Manifest:
    """Two draws of three shards, one of them empty."""
    small = sets.complete(shards=((64, 64, 3), (64, 64, 0), (64, 128, 1)), draws=2)
    return Manifest.build(small.identity, 0, small.indices)


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_a_manifest_is_read_back(kind: str, layout: str, sets) -> None:
    small = sets.complete(kind, layout)
    content = (small.directory / "manifest.json").read_bytes()
    manifest = Manifest.from_bytes(content, "x")
    assert manifest.to_bytes() == content
    assert manifest.identity == small.identity
    assert manifest.names() == sorted(index.name for index in small.indices)


def test_any_finisher_writes_the_same_bytes(sets) -> None:
    small = sets.complete(draws=2)
    forwards = Manifest.build(small.identity, 3, small.indices)
    backwards = Manifest.build(small.identity, 3, small.indices[::-1])
    assert forwards.to_bytes() == backwards.to_bytes()


def test_an_entry_says_what_its_index_says(sets) -> None:
    small = sets.complete(shards=((64, 64, 3),))
    index = small.indices[0]
    manifest = Manifest.build(small.identity, 0, [index])
    entry = manifest.entry(index.name)
    assert entry.name(small.identity.id) == index.name
    assert entry.tar_bytes == (small.directory / index.name.tar).stat().st_size
    assert (entry.first_id, entry.last_id) == (index.image_id(0), index.image_id(2))
    assert (entry.index_digest, entry.keys_digest) == (index.digest, index.keys_digest)
    assert manifest.num_records == entry.num_records == 3


def test_draws_are_counted_from_the_shards(manifest: Manifest) -> None:
    assert manifest.draws == 2
    assert Manifest.build(manifest.identity, 0, []).draws == 1


def test_a_set_without_shards_has_a_manifest(manifest: Manifest) -> None:
    empty = Manifest.build(manifest.identity, 0, [])
    assert Manifest.from_bytes(empty.to_bytes(), "x") == empty


def test_an_index_of_another_set_is_refused(sets) -> None:
    small = sets.complete(shards=((64, 64, 1),))
    other = replace(small.identity, content={})
    with pytest.raises(CorruptError, match="an index of set"):
        Manifest.build(other, 0, small.indices)


@pytest.mark.parametrize("rows", [[0, 0], [0, 1, 2], [1], [0, 3]], ids=str)
def test_shards_that_are_twice_or_lack_a_draw_are_refused(rows: list[int], sets) -> None:
    small = sets.complete(shards=((64, 64, 1), (64, 64, 1)), draws=2)
    with pytest.raises(CorruptError):
        Manifest.build(small.identity, 0, [small.indices[row] for row in rows])


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_only_predictions_have_draws(kind: str, sets) -> None:
    small = sets.start(kind)
    for draw in range(2):
        small.add_shard(ShardName(small.identity.id, 64, 64, 0, draw), [])
    empty_sha256 = "0" * 64 if kind == "text" else None
    with pytest.raises(CorruptError, match=f"a {kind} set does not have"):
        Manifest.build(small.identity, 0, small.indices, (), empty_sha256)


def test_draws_with_other_keys_are_refused(sets, ids) -> None:
    small = sets.start()
    for draw in range(2):
        small.add_shard(ShardName(small.identity.id, 64, 64, 0, draw), ids(2, salt=str(draw)))
    with pytest.raises(CorruptError, match="other keys"):
        Manifest.build(small.identity, 0, small.indices)


def test_every_flipped_byte_is_refused(manifest: Manifest) -> None:
    content = manifest.to_bytes()
    silent = []
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x01
        try:
            Manifest.from_bytes(bytes(flipped), "x")
        except CorruptError:
            continue
        silent.append(position)
    assert silent == []


def test_white_space_is_refused(manifest: Manifest) -> None:
    with pytest.raises(CorruptError, match="digest"):
        Manifest.from_bytes(manifest.to_bytes() + b"\n", "x")


def signed(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Encode a manifest whose fields were changed, with the digest that it then has."""
    fields = json.loads(manifest.to_bytes())
    del fields["digest"]
    change(fields)
    return seal(fields)


def test_the_forger_of_these_tests_can_sign(manifest: Manifest) -> None:
    forged = Manifest.from_bytes(signed(manifest, lambda fields: fields.update(catalog=9)), "x")
    assert forged.catalog == 9


def column(name: str, row: int, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["shards"][name].__setitem__(row, value)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "width that is no multiple of 8": column("width", 0, 60),
    "width of a text": column("width", 0, "../64"),
    "width of a float": column("width", 0, 64.0),
    "huge width": column("width", 0, 8200),
    "negative number": column("number", 0, -1),
    "number of seven digits": column("number", 0, 1_000_000),
    "true as number": column("number", 2, True),
    "absurd draw": column("draw", 1, 1 << 40),
    "draw twice": column("draw", 1, 0),
    "too many records": column("num_records", 0, 65_537),
    "more than 2 GiB": column("tar_bytes", 0, (2 << 30) + 1),
    "digest too short": column("tar_sha256", 0, "0" * 63),
    "digest in capitals": column("index_digest", 0, "A" * 64),
    "no digest": column("keys_digest", 0, None),
    "no source": column("source_sha256", 0, None),
    "id of an empty shard": column("first_id", 2, "0" * 32),
    "last before first": column("last_id", 0, "0" * 32),
    "first is no id": column("first_id", 0, "0" * 31 + "\n"),
    "shard moved": column("number", 4, 1),
    "column cut": lambda fields: fields["shards"]["width"].pop(),
    "column missing": lambda fields: fields["shards"].pop("width"),
    "column unknown": lambda fields: fields["shards"].update(url=[]),
    "column is text": lambda fields: fields["shards"].update(width="64" * 3),
    "shards as rows": lambda fields: fields.update(shards=[]),
    "field unknown": lambda fields: fields.update(host="node7"),
    "field missing": lambda fields: fields.pop("catalog"),
    "catalog is negative": lambda fields: fields.update(catalog=-1),
    "draws is another": lambda fields: fields.update(draws=3),
    "undecodable in predictions": lambda fields: fields.update(undecodable=["0" * 32 + "_64x64"]),
    "undecodable is text": lambda fields: fields.update(undecodable="abc"),
    "undecodable numbers": lambda fields: fields.update(undecodable=[1]),
    "empty record in predictions": lambda fields: fields.update(empty_sha256="0" * 64),
    "another fingerprint": lambda fields: fields.update(fingerprint="0" * 64),
    "place too high": lambda fields: fields["latents"].update(place="../../../../etc"),
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES.keys())
def test_a_manifest_that_lies_with_a_right_digest_is_refused(
    change: Callable[[dict[str, Any]], object], manifest: Manifest
) -> None:
    with pytest.raises(CorruptError):
        Manifest.from_bytes(signed(manifest, change), "x")


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("width of a text", r"shards.width\[0\] has an illegal value; expected a multiple of 8 up"),
        ("absurd draw", r"shards.draw\[1\] has an illegal value; expected a whole number from 0"),
        ("no digest", r"shards.keys_digest\[0\] has an illegal value; expected 64 hex digits"),
        ("column cut", "shards has columns of unequal length"),
        ("catalog is negative", "catalog has an illegal value; expected a whole number from 0 to"),
        ("draws is another", "draws has a wrong value; expected 2"),
        ("undecodable is text", "undecodable is not a list; expected a list of keys"),
        ("undecodable numbers", r"undecodable\[0\] is not text; expected a key"),
        (
            "undecodable in predictions",
            "undecodable names 1 images; expected none in a predictions",
        ),
        ("empty record in predictions", "empty_sha256 has an illegal value; expected null in a"),
    ],
)
def test_the_place_of_an_illegal_value_is_named(lie: str, message: str, manifest: Manifest) -> None:
    with pytest.raises(CorruptError, match=f"^x: {message}"):
        Manifest.from_bytes(signed(manifest, LIES[lie]), "x")


LOW, HIGH = "1" * 32, "2" * 32


@pytest.mark.parametrize(
    ("num_records", "first", "last"),
    [(1, LOW, HIGH), (2, LOW, LOW), (2, HIGH, LOW), (0, LOW, LOW), (2, None, None), (2, LOW, None)],
)
def test_the_ids_of_a_shard_fit_the_number_of_its_records(
    num_records: int, first: str | None, last: str | None, sets
) -> None:
    small = sets.complete(shards=((64, 64, 2),))
    manifest = Manifest.build(small.identity, 0, small.indices)
    changes = {"num_records": num_records, "first_id": first, "last_id": last}

    def change(fields: dict[str, Any]) -> None:
        for name, value in changes.items():
            fields["shards"][name][0] = value

    with pytest.raises(CorruptError, match="first and last ids"):
        Manifest.from_bytes(signed(manifest, change), "x")


@pytest.mark.parametrize(
    "keys", [["x"], ["b" * 32 + "_64x64", "a" * 32 + "_64x64"], ["a" * 32 + "_64x64"] * 2]
)
def test_undecodable_keys_are_sorted_and_unique(keys: list[str], sets) -> None:
    latents = sets.start("latents").identity
    manifest = Manifest(latents, 0, (), ("a" * 32 + "_64x64", "b" * 32 + "_64x64"))
    assert Manifest.from_bytes(manifest.to_bytes(), "x") == manifest
    with pytest.raises(CorruptError):
        Manifest.from_bytes(signed(manifest, lambda fields: fields.update(undecodable=keys)), "x")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"catalog":0,"catalog":0}',
        b'{"catalog":NaN}',
        b'{"catalog":-Infinity}',
        b'{"catalog":1e999}',
        b"[" * 9 + b"]" * 9,
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b"1" * 100_000,
    ],
    ids=lambda content: str(content[:30]),
)
def test_json_that_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptError):
        Manifest.from_bytes(content, "x")


def test_json_beyond_its_bound_is_not_parsed() -> None:
    with pytest.raises(CorruptError, match="5 bytes"):
        bounded_json.parse_json(b"[1,2]", "x", max_bytes=4)


def test_a_newer_version_asks_for_a_newer_program(manifest: Manifest) -> None:
    newer = signed(manifest, lambda fields: fields.update(format_version=2, novelty=True))
    with pytest.raises(IncompatibleError, match="format version 2"):
        Manifest.from_bytes(newer, "x")


def test_errors_repeat_nothing_of_a_strangers_manifest(manifest: Manifest) -> None:
    for change in (column("tar_sha256", 0, "\x1b[2J"), lambda fields: fields.update(evil="\x1b")):
        with pytest.raises(CorruptError) as caught:
            Manifest.from_bytes(signed(manifest, change), "x")
        assert "\\x1b" not in ascii(str(caught.value))
