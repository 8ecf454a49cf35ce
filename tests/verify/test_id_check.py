"""All ids of a set together: what comes twice is named, what only looks alike is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.verified_sets import synthetic_index

from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.record import RecordHeader, latents_schema
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.verify.id_check import IdCheck

RECORD = SetIdentity(kind="latents", id="latents", schema=latents_schema())


def _index(number: int, *ids: tuple[int, int]) -> ShardIndex:
    header = RecordHeader.build(RECORD.schema, 64, 64, RECORD.fingerprint)
    index = synthetic_index(ShardName("latents", 64, 64, number), header, len(ids))
    halves = np.array(ids, ">u8").reshape(-1, 2)
    return replace(index, ids=halves.view(np.uint8).reshape(-1, 16))


def _messages(*indices: ShardIndex, undecodable: tuple[str, ...] = ()) -> list[str]:
    check = IdCheck(RECORD, undecodable)
    for index in indices:
        check.add(index)
    there = {index.name: index for index in indices}
    return [str(finding.error.found) for finding in check.findings(there.get)]


def test_an_id_in_two_shards_is_named() -> None:
    found = _messages(_index(0, (1, 2), (3, 4)), _index(1, (1, 5), (3, 4)), _index(2))
    assert found == [f"image {3:016x}{4:016x} is in more than one shard"]


def test_ids_whose_halves_fold_alike_are_no_finding() -> None:
    assert _messages(_index(0, (1, 2)), _index(1, (2, 1)), _index(2, (3, 0))) == []


def test_among_ids_that_fold_alike_the_one_that_comes_twice_is_named() -> None:
    found = _messages(_index(0, (1, 2)), _index(1, (2, 1)), _index(2, (1, 2)))
    assert found == [f"image {1:016x}{2:016x} is in more than one shard"]


@pytest.mark.parametrize("draw", [0, 1])
def test_a_record_that_was_said_not_to_decode_is_named_in_every_draw(draw: int) -> None:
    index = _index(0, (1, 2), (3, 4))
    index = replace(index, name=replace(index.name, draw=draw))
    assert len(_messages(index, undecodable=(index.key(1), "other"))) == 1


def test_a_set_without_records_has_no_finding() -> None:
    assert _messages() == [] == _messages(_index(0))
