"""What a joined batch holds, against a join by plain webdataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.oracles.joined_by_webdataset import Records, read_all, record_name
from support.shard_sets import ShardSets, path_of

from sdxl_distill.core.noise import noise, noise_seed
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.loader import JoinedStream

Teachers = Callable[..., list[ShardSet]]

GLOBAL_BATCH = 4


def first_epochs(stream: JoinedStream, num_epochs: int = 3) -> list[JoinedBatch]:
    with stream:
        return [batch for epoch in range(num_epochs) for batch in stream.epoch(epoch)]


def stacked(records: Records, names: list[str], tensor: str) -> torch.Tensor:
    return torch.stack([records[name][tensor] for name in names])


def require_joined(batch: JoinedBatch, teachers: list[ShardSet], text: Path) -> None:
    """Compare a batch with what webdataset reads from the same tars."""
    names = [record_name(key, draw) for key, draw in zip(batch.keys, batch.draws, strict=True)]
    keys = list(batch.keys)
    first = read_all(path_of(teachers[0]))
    latents = read_all(path_of(teachers[0]).parents[1] / "latents")
    assert torch.equal(batch.latents, stacked(latents, keys, "latents"))
    assert torch.equal(batch.time_ids, stacked(latents, keys, "time_ids"))
    assert torch.equal(batch.timesteps, stacked(first, names, "timestep")[:, 0])
    for teacher, prediction in zip(teachers, batch.predictions, strict=True):
        expected = stacked(read_all(path_of(teacher)), names, "teacher_pred")
        assert torch.equal(prediction, expected)
    embeddings = read_all(text)
    text_names = names if text == path_of(teachers[0]) else keys
    for tensor in ("encoder_hidden_states", "pooled_embeds"):
        assert torch.equal(getattr(batch, tensor), stacked(embeddings, text_names, tensor))
    for row, seed in enumerate(stacked(first, names, "seed")[:, 0].tolist()):
        assert np.array_equal(batch.noise[row].numpy(), noise(seed, *batch.bucket))


def test_a_full_layout_is_joined_as_webdataset_would(teachers: Teachers) -> None:
    opened = teachers("full", "full", "full")
    batches = first_epochs(JoinedStream(opened, global_batch=GLOBAL_BATCH))
    assert {batch.bucket for batch in batches} == {(64, 64), (64, 128)}
    for batch in batches:
        require_joined(batch, opened, path_of(opened[0]))


def test_a_compact_layout_is_joined_as_webdataset_would(teachers: Teachers) -> None:
    opened = teachers("compact", "compact")
    text = path_of(opened[0]).parent / "text-111111111111"
    for batch in first_epochs(JoinedStream(opened, global_batch=GLOBAL_BATCH)):
        require_joined(batch, opened, text)


def test_several_draws_are_joined_as_webdataset_would(teachers: Teachers) -> None:
    opened = teachers("full", "compact", draws=3)
    batches = first_epochs(JoinedStream(opened, global_batch=GLOBAL_BATCH), num_epochs=4)
    assert {draw for batch in batches for draw in batch.draws} == {0, 1, 2}
    for batch in batches:
        require_joined(batch, opened, path_of(opened[0]))


def test_the_layouts_of_one_cache_give_equal_batches(sets: ShardSets) -> None:
    sets.text()
    layouts = (("full", "full"), ("compact", "compact"), ("full", "compact"), ("compact", "full"))
    streams: list[list[JoinedBatch]] = []
    for number, layout in enumerate(layouts):
        folder = f"teachers/{number}"
        # The text set lies beside the folders of each pair of teachers.
        opened = [
            open_shard_set(sets.teacher(name, each, folder=folder))  # type: ignore[arg-type]
            for name, each in zip(("a", "b"), layout, strict=True)
        ]
        streams.append(first_epochs(JoinedStream(opened, global_batch=GLOBAL_BATCH)))
    for batches in zip(*streams, strict=True):
        for other in batches[1:]:
            for name, tensor in tensors_of(batches[0]).items():
                assert torch.equal(tensor, tensors_of(other)[name]), name


def tensors_of(batch: JoinedBatch) -> dict[str, torch.Tensor]:
    tensors = {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
    return tensors | {f"prediction {row}": each for row, each in enumerate(batch.predictions)}


def test_draws_that_only_one_teacher_has_are_not_read(sets: ShardSets) -> None:
    opened = [
        open_shard_set(sets.teacher("a", draws=3)),
        open_shard_set(sets.teacher("b", draws=2)),
    ]
    batches = first_epochs(JoinedStream(opened, global_batch=GLOBAL_BATCH), num_epochs=4)
    assert {draw for batch in batches for draw in batch.draws} == {0, 1}


def test_predictions_keep_the_dtype_of_each_cache(sets: ShardSets) -> None:
    opened = [open_shard_set(sets.teacher(name, dtype=name)) for name in ("F16", "F32")]
    batch = next(JoinedStream(opened, global_batch=GLOBAL_BATCH).epoch(0))
    assert [each.dtype for each in batch.predictions] == [torch.float16, torch.float32]


def test_the_student_may_be_conditioned_on_the_text_of_a_later_teacher(sets: ShardSets) -> None:
    opened = [
        open_shard_set(sets.teacher("a", encoders="1" * 64)),
        open_shard_set(sets.teacher("b", encoders="3" * 64)),
    ]
    stream = JoinedStream(opened, global_batch=GLOBAL_BATCH, text_fingerprint="3" * 64)
    batch = next(stream.epoch(0))
    expected = stacked(read_all(path_of(opened[1])), list(batch.keys), "pooled_embeds")
    assert torch.equal(batch.pooled_embeds, expected)


def test_a_text_set_beside_the_teachers_is_found(sets: ShardSets) -> None:
    opened = [open_shard_set(sets.teacher("a"))]
    text = sets.text("3" * 64)
    stream = JoinedStream(opened, global_batch=GLOBAL_BATCH, text_fingerprint="3" * 64)
    batch = next(stream.epoch(0))
    expected = stacked(read_all(text), list(batch.keys), "pooled_embeds")
    assert torch.equal(batch.pooled_embeds, expected)


def test_a_text_set_that_is_given_is_used(sets: ShardSets) -> None:
    opened = [open_shard_set(sets.teacher("a"))]
    text = open_shard_set(sets.text())
    stream = JoinedStream(opened, global_batch=GLOBAL_BATCH, text=text)
    assert stream.fingerprints()[text.id] == text.manifest.identity.fingerprint
    next(stream.epoch(0))


@pytest.mark.parametrize("tensor", ["seed", "timestep"])
@pytest.mark.parametrize("layout", ["full", "compact"])
def test_a_question_that_does_not_follow_from_the_id_is_named(
    sets: ShardSets, tensor: str, layout: str
) -> None:
    sets.text()
    good = sets.teacher("good")
    bad = sets.teacher("bad", layout, change={tensor: lambda value: value ^ 1})  # type: ignore[arg-type]
    stream = JoinedStream([open_shard_set(good), open_shard_set(bad)], global_batch=GLOBAL_BATCH)
    with pytest.raises(CorruptError, match=rf"set bad, shard bad-64.* the {tensor} is not"):
        next(stream.epoch(0))


@pytest.mark.parametrize("first_layout", ["full", "compact"])
def test_a_teacher_that_saw_other_noise_is_named(sets: ShardSets, first_layout: str) -> None:
    sets.text()
    good = sets.teacher("good", first_layout)  # type: ignore[arg-type]
    bad = sets.teacher("bad", "full", change={"noise": lambda value: value[:, ::-1]})
    stream = JoinedStream([open_shard_set(good), open_shard_set(bad)], global_batch=GLOBAL_BATCH)
    with pytest.raises(IncompatibleError, match=r"other noise.*noise of set"):
        next(stream.epoch(0))


def test_noise_that_numpy_makes_differently_today_is_refused(
    sets: ShardSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets.text()
    monkeypatch.setattr("support.shard_sets.noise", lambda seed, *sides: noise(seed, *sides) + 1)
    with open_shard_set(sets.teacher("a", "compact")) as teacher:
        stream = JoinedStream([teacher], global_batch=GLOBAL_BATCH)
        with pytest.raises(IncompatibleError, match="the noise of the seed"):
            next(stream.epoch(0))


def test_embeddings_that_differ_by_rounding_are_the_same_caption(sets: ShardSets) -> None:
    rounding = {"pooled_embeds": lambda value: value * np.float16(1.002)}
    opened = [
        open_shard_set(sets.teacher("a")),
        open_shard_set(sets.teacher("b", change=rounding)),
    ]
    batch = next(JoinedStream(opened, global_batch=GLOBAL_BATCH).epoch(0))
    require_joined(batch, opened, path_of(opened[0]))


def test_embeddings_of_another_caption_are_refused(sets: ShardSets) -> None:
    other = {"pooled_embeds": lambda value: value[::-1].copy()}
    opened = [open_shard_set(sets.teacher("a")), open_shard_set(sets.teacher("b", change=other))]
    with pytest.raises(IncompatibleError, match=r"set b, .* another caption; .* set a"):
        next(JoinedStream(opened, global_batch=GLOBAL_BATCH).epoch(0))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("set_id", "tensor"),
    [
        ("latents", "latents"),
        ("latents", "time_ids"),
        ("text-111111111111", "encoder_hidden_states"),
        ("text-111111111111", "pooled_embeds"),
        ("a", "noise"),
        ("a", "teacher_pred"),
        ("b", "teacher_pred"),
    ],
)
def test_a_flipped_byte_is_found_in_whatever_is_read(
    sets: ShardSets, set_id: str, tensor: str
) -> None:
    text = open_shard_set(sets.text())
    opened = [open_shard_set(sets.teacher(name)) for name in ("a", "b")]
    stream = JoinedStream(opened, global_batch=GLOBAL_BATCH, text=text)
    place = next(path for path in sets.root.rglob(set_id) if path.is_dir())
    damaged = open_shard_set(place)
    for name in damaged.manifest.names():
        index = damaged.index(name)
        for record in range(index.num_records):
            flip(place / name.tar, int(index.offsets[record]) + index.header.place(tensor).offset)
    with pytest.raises(CorruptError, match=rf"set {set_id}, shard .*, key .*tensor {tensor}"):
        next(stream.epoch(0))


def test_a_flipped_byte_in_an_index_is_found(teachers: Teachers) -> None:
    opened = teachers("full", "full")
    stream = JoinedStream(opened, global_batch=GLOBAL_BATCH)
    for path in path_of(opened[1]).glob("*.idx"):
        flip(path, path.stat().st_size // 2)
    with pytest.raises(CorruptError, match=r"b-64x.*\.idx"):
        next(stream.epoch(0))


def test_a_tar_that_vanished_is_named(teachers: Teachers) -> None:
    opened = teachers("full", "full")
    stream = JoinedStream(opened, global_batch=GLOBAL_BATCH)
    for path in path_of(opened[1]).glob("*.tar"):
        path.unlink()
    with pytest.raises(CorruptError, match=r"b-64x.*\.tar: is missing"):
        next(stream.epoch(0))


def test_the_seed_of_a_draw_is_that_of_the_key(teachers: Teachers) -> None:
    opened = teachers("compact", draws=2)
    for batch in first_epochs(JoinedStream(opened, global_batch=GLOBAL_BATCH)):
        for key, draw, values in zip(batch.keys, batch.draws, batch.noise, strict=True):
            seed = noise_seed(key[:32], 42, draw)
            assert np.array_equal(values.numpy(), noise(seed, *batch.bucket))
