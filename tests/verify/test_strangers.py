"""Sets from strangers: whatever their JSON and headers say, an error of ours comes out, or none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support.shard_sets import NUM_CHANNELS, ShardSets

from sdxl_distill.core.image_id import image_id
from sdxl_distill.errors import CorruptError, DistillError
from sdxl_distill.fingerprint import canonical_json, fingerprint
from sdxl_distill.loose.pack import pack_set
from sdxl_distill.loose.unpack import unpack_set
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest, ShardEntry
from sdxl_distill.shards.record import RecordHeader, RecordSchema, encode_record, latents_schema
from sdxl_distill.shards.set_identity import FIELDS, SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.shards.sidecar import parse_captions
from sdxl_distill.stream.loader import JoinedStream
from sdxl_distill.verify.loose_folder import verify_loose
from sdxl_distill.verify.whole_set import verify_set

SIZES = {(64, 64, 0): 2, (64, 128, 0): 1}
SETS = ("latents", "teachers/full", "teachers/compact", "teachers/text-111111111111")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latents set, a text set, and a teacher in each layout."""
    sets = ShardSets(tmp_path_factory.mktemp("cache"), SIZES)
    sets.latents()
    sets.text()
    sets.teacher("full", "full")
    sets.teacher("compact", "compact")
    return sets.root


def _use(root: Path, changed: Path) -> int:
    """Do with the sets of a cache what users do; return how many batches were joined."""
    verify_set(changed)
    num_batches = 0
    with ExitStack() as stack:
        opened = []
        for name in SETS:
            with suppress(DistillError):
                opened.append(stack.enter_context(open_shard_set(root / name)))
        teachers = [each for each in opened if each.manifest.identity.kind == "predictions"]
        for chosen in (teachers, teachers[-1:]):
            with (
                suppress(DistillError),
                JoinedStream(chosen, global_batch=2, num_threads=1) as stream,
            ):
                num_batches += len(list(stream.epoch(0)))
    return num_batches


def test_unchanged_sets_are_valid_and_joined(cache: Path) -> None:
    assert _use(cache, cache / "latents") > 0
    assert [verify_set(cache / name).findings for name in SETS[1:]] == [[]] * 3


DEEP: Any = 0
for _ in range(12):
    DEEP = [DEEP]
ODD_TENSORS = [
    {"name": name, "dtype": dtype, "shape": shape}
    for name in ("seed", "resolution", "noise", "mask")
    for dtype in ("I64", "F32", "F16")
    for shape in ([1], [2], ["H/8"], [1 << 20] * 4, [4, "H/8", "W/8"])
]
ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**64, 10**400, 0.5, -0.0, 1e308, DEEP]),
    st.sampled_from(["", "\0", "\ud800", "..", "../../x", "a" * 300, "0" * 64, "H/8", "I32"]),
    st.sampled_from([[], {}, [2], [1 << 20] * 4, ["H/8", "W/8"], [[0]], {"seed": 1}]),
    st.sampled_from(ODD_TENSORS),
).map(deepcopy)
DEEPER = st.sampled_from([True, True, True, False])


def _mutate(tree: Any, draw: st.DataObject) -> None:
    """Change one place: another value, one less, one twice, one more."""
    container, key = tree, draw.draw(_keys(tree), label="key")
    while isinstance(container[key], dict | list) and container[key] and draw.draw(DEEPER):
        container = container[key]
        key = draw.draw(_keys(container), label="key")
    change = draw.draw(st.sampled_from(["value", "value", "remove", "insert"]), label="change")
    value = draw.draw(st.one_of(ODD_VALUES, st.just(container[key])), label="value")
    if change == "value":
        container[key] = value
    elif change == "remove":
        del container[key]
    elif isinstance(container, list):
        container.insert(key, value)
    else:
        container[f"{key}2"] = value


def _keys(container: Any) -> st.SearchStrategy[Any]:
    keys = sorted(container) if isinstance(container, dict) else range(len(container))
    return st.sampled_from(keys)


def _sealed(fields: dict[str, Any]) -> bytes:
    """Write fields with the fingerprint and digest that they have: only then are they looked at."""
    fields = dict(fields)
    fields.pop("digest", None)
    try:
        content = {name: fields[name] for name in FIELDS - {"fingerprint", "generation", "id"}}
        for name in ("latents", "text"):
            content[name] = content[name] and content[name]["fingerprint"]
        fields["fingerprint"] = fingerprint(content)
    except (KeyError, TypeError, IndexError):
        pass
    return canonical_json({**fields, "digest": fingerprint(fields)})


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # a link into the cache that all examples share
    path.write_bytes(content)


@settings(max_examples=30, deadline=None)
@given(draw=st.data())
def test_changed_json_of_a_set_gives_errors_of_ours(cache: Path, draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(cache, Path(folder) / "cache", copy_function=os.link))
        target = root / draw.draw(st.sampled_from(SETS), label="set")
        manifest = json.loads((target / "manifest.json").read_bytes())
        for _ in range(draw.draw(st.integers(1, 2), label="changes")):
            _mutate(manifest, draw)
        record = {name: manifest[name] for name in FIELDS if name in manifest}
        _replace(target / "manifest.json", _sealed(manifest))
        _replace(target / "set.json", _sealed(record))
        _use(root, target)


@settings(max_examples=30, deadline=None)
@given(draw=st.data())
def test_changed_headers_of_an_index_give_errors_of_ours(cache: Path, draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(cache, Path(folder) / "cache", copy_function=os.link))
        target = root / draw.draw(st.sampled_from(SETS), label="set")
        path = draw.draw(st.sampled_from(sorted(target.glob("*.idx"))), label="index")
        content = path.read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        fields = json.loads(content[8:size])
        _mutate(fields, draw)
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
        header = text.encode(errors="surrogatepass")
        header += b" " * (-len(header) % 8)
        _replace(path, len(header).to_bytes(8, "little") + header + content[size:])
        _use(root, target)


def _with_index(root: Path, change: dict[str, Any]) -> None:
    """Give the first shard of the compact teacher another index, and the manifest its digest."""
    target = root / "teachers/compact"
    manifest = Manifest.from_bytes((target / "manifest.json").read_bytes(), "")
    entry = manifest.shards[0]
    name = entry.name("compact")
    index = replace(ShardIndex.from_bytes((target / name.idx).read_bytes(), name), **change)
    shards = (ShardEntry.of(index), *manifest.shards[1:])
    _replace(target / name.idx, index.to_bytes())
    _replace(target / "manifest.json", replace(manifest, shards=shards).to_bytes())


@pytest.fixture
def own_cache(cache: Path, tmp_path: Path) -> Path:
    """A copy of the cache to be changed."""
    return Path(shutil.copytree(cache, tmp_path / "own"))


def test_a_compact_index_without_noise_digests_is_corrupt(own_cache: Path) -> None:
    _with_index(own_cache, {"noise_digests": None})
    with open_shard_set(own_cache / "teachers/compact") as shard_set:
        with pytest.raises(CorruptError, match="noise digests are missing"):
            shard_set.index(shard_set.manifest.names()[0])
        assert verify_set(own_cache / "teachers/compact").exit_code == 3
        with JoinedStream([shard_set], global_batch=2) as stream, pytest.raises(CorruptError):
            list(stream.epoch(0))


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("seed", "I64", [2]),
        ("seed", "F32", [1]),
        ("timestep", "I64", []),
        ("resolution", "F32", [2]),
        ("noise", "F16", [4, "W/8", "H/8"]),
        ("time_ids", "I32", [7]),
    ],
)
def test_a_schema_whose_tensors_are_not_what_they_are_called_is_corrupt(name, dtype, shape) -> None:
    schema = [*latents_schema().to_json(), {"name": name, "dtype": dtype, "shape": shape}]
    with pytest.raises(CorruptError):
        RecordSchema.from_json(schema[1:] if name == "time_ids" else schema, "set.json")


def test_a_schema_of_huge_records_is_corrupt_before_memory_is_taken() -> None:
    huge = {"name": "mask", "dtype": "I64", "shape": [1 << 20, 1 << 18]}
    with pytest.raises(CorruptError, match="huge records"):
        RecordSchema.from_json([*latents_schema().to_json(), huge], "set.json")
    wide = RecordSchema.from_json(
        [{"name": "mask", "dtype": "F32", "shape": [64, "H/8", "W/8"]}], "set.json"
    )
    with pytest.raises(CorruptError, match="at most 67108864"):
        RecordHeader.build(wide, 8192, 8192, "0" * 64)


def test_a_set_of_huge_records_is_refused_by_every_reader(own_cache: Path) -> None:
    target = own_cache / "latents"
    identity = SetIdentity.from_bytes((target / "set.json").read_bytes(), "")
    fields = {**identity.to_json()}
    fields["schema"] = [*fields["schema"], {"name": "x", "dtype": "I64", "shape": [1 << 20] * 2}]
    manifest = json.loads((target / "manifest.json").read_bytes())
    _replace(target / "set.json", _sealed(fields))
    _replace(target / "manifest.json", _sealed({**manifest, **fields}))
    for read in (
        open_shard_set,
        lambda path: unpack_set(path, own_cache / "loose"),
        lambda path: pack_set(path, own_cache / "packed"),
    ):
        with pytest.raises(CorruptError):
            read(target)
    assert verify_set(target).exit_code == 3


@pytest.mark.parametrize("recipe_known", [False, True])
def test_loose_records_with_odd_tensors_are_findings(tmp_path: Path, recipe_known: bool) -> None:
    zeros = np.zeros((NUM_CHANNELS, 8, 8), np.float16)
    good = {"latents": zeros, "time_ids": np.array([64, 64, 0, 0, 64, 64], np.int32)}
    odd = [
        {"seed": np.zeros(2, np.int64)},
        {"seed": np.zeros(1, np.int64)},
        {"resolution": np.full(2, np.nan, np.float32)},
        {"timestep": np.zeros((1, 1), np.int64)},
        {"noise": np.zeros((1 << 20, 1, 1), np.float16), "seed": np.zeros(1, np.int64)},
    ]
    for number, tensors in enumerate(odd):
        stem = f"{image_id(b'%d' % number)}_64x64"
        record = encode_record({**good, **tensors}, {"fingerprint": "0" * 64})
        (tmp_path / f"{stem}.safetensors").write_bytes(record)
        (tmp_path / f"{stem}.json").write_bytes(b'{"captions":["a"]}')
    recipe = None
    if recipe_known:
        from sdxl_distill.shards.set_identity import NoiseRecipe

        recipe = NoiseRecipe("philox-ziggurat64-1", 42, 0, 1000)
    found = verify_loose(tmp_path, recipe=recipe)
    assert len(found.findings) == len(odd) - 1 and found.exit_code == 3


@pytest.mark.parametrize(
    "sidecar",
    [
        b"[" * 100_000,
        b'{"captions":' + b"[" * 100_000,
        b'{"captions":["\\ud800"]}',
        b'{"captions":"a"}',
        b'{"captions":{"a":1}}',
        b'{"captions":[]}',
        b'{"captions":[1]}',
        b'{"captions":' + b"9" * 5000 + b"}",
        b"null",
        b"\xff",
        b"",
    ],
)
def test_a_sidecar_without_captions_is_corrupt(sidecar: bytes) -> None:
    with pytest.raises(CorruptError, match="no captions"):
        parse_captions(sidecar, "build it again")


def test_the_caption_of_a_sidecar_may_be_empty() -> None:
    assert parse_captions(b'{"captions":[""]}', "build it again") == [""]


def test_the_name_of_a_shard_is_that_of_its_numbers() -> None:
    assert ShardName.parse("latents-64x64-1000000.tar", "latents") is None
