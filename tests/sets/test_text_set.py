from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.damages import DAMAGES
from support.oracles.pipeline import PipelineOracle
from support.oracles.tars import read_set
from support.photos import LONG_CAPTION, write_image, write_images
from support.workshop import identities, published_files, traces
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_distill.builder.launch import Launch
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.predictions_set import open_latents
from sdxl_distill.sets.text_set import build_text_set
from sdxl_distill.shards.shard_set import open_shard_set

pytestmark = pytest.mark.processors

ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)


def build_text(workshop, *overrides, **options):
    config = workshop.config(*overrides)
    place, built = build_text_set(config, open_latents(config), Launch(World()), **options)
    return Path(str(place)), built


@pytest.fixture(scope="module")
def photo_text(photo_workshop):
    return build_text(photo_workshop)[0]


@pytest.fixture(scope="module")
def oracle(tiny_family):
    return PipelineOracle(tiny_family.base)


def test_embeddings_equal_those_of_encode_prompt(photo_workshop, photo_text, oracle):
    latents, text = read_set(photo_workshop.latents), read_set(photo_text)
    assert text.keys() == latents.keys()
    for key, record in text.items():
        hidden, pooled = oracle.embeddings(latents[key].sidecar["captions"][0])
        assert torch.equal(record.tensors["encoder_hidden_states"], hidden)
        assert torch.equal(record.tensors["pooled_embeds"], pooled)


def test_the_empty_record_equals_encode_prompt_of_nothing(photo_text, oracle):
    hidden, pooled = oracle.embeddings("")
    for record in (
        load_file(photo_text / "empty.safetensors"),
        open_shard_set(photo_text).read_empty_record(),
    ):
        assert torch.equal(record["encoder_hidden_states"], hidden)
        assert torch.equal(record["pooled_embeds"], pooled)


def test_shards_are_aligned_with_those_of_the_latents(photo_workshop, photo_text):
    latents, text = read_set(photo_workshop.latents), read_set(photo_text)
    shards = {key: record.tar.removeprefix("latents") for key, record in latents.items()}
    assert {key: record.tar.removeprefix(photo_text.name) for key, record in text.items()} == shards


def test_captions_that_are_cut_are_counted(workshop, caplog):
    write_image(workshop.images / "long.png", 100, caption=LONG_CAPTION)
    write_image(workshop.images / "again.png", 101, caption=LONG_CAPTION)
    workshop.build_latents()
    build_text(workshop)
    assert "1 distinct captions are longer than 77 tokens" in caplog.text


def test_the_encoders_are_gone_when_the_set_is_built(workshop):
    workshop.build_latents()
    gc.collect()
    gc.disable()
    try:
        before = [id(each) for each in gc.get_objects() if type(each) in ENCODERS]
        build_text(workshop)
        after = [id(each) for each in gc.get_objects() if type(each) in ENCODERS]
    finally:
        gc.enable()
    assert after == before


def test_other_encoders_have_a_set_of_their_own(workshop, make_family):
    workshop.build_latents()
    other = make_family(seed=1).base
    paths = {build_text(workshop)[0], build_text(workshop, f'model.text_encoder_id="{other}"')[0]}
    assert len(paths) == 2


def test_teachers_with_the_same_encoders_share_a_set(built_workshop, tiny_family):
    workshop = built_workshop
    before = identities(workshop.text.iterdir())
    workshop.build_shards(
        f'teacher.checkpoint_path="{tiny_family.teachers[1]}"',
        "teacher.teacher_id=teacher_b",
        f'model.text_encoder_id="{tiny_family.teachers[2]}"',  # the same files elsewhere
    )
    assert identities(workshop.text.iterdir()) == before


def test_new_images_go_to_new_shards_and_the_others_stay(built_workshop):
    workshop = built_workshop
    committed = identities(workshop.text.glob("text-*"))
    write_images(workshop.images, 4, first=13)
    workshop.build_latents()
    build_text(workshop)
    assert committed.items() <= identities(workshop.text.glob("text-*")).items()
    assert read_set(workshop.text).keys() == read_set(workshop.latents).keys()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_repair_gives_the_bytes_of_an_undamaged_build(built_workshop, damage):
    workshop, text = built_workshop, built_workshop.text
    before = published_files(text)
    shards = sorted(text.glob("*.tar"))
    kept = identities(shards[2:])
    damage(shards[0])
    build_text(workshop, repair=True)
    assert published_files(text) == before
    assert kept.items() <= identities(text.glob("*.tar")).items()


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_a_bad_empty_record_is_written_again_by_a_repair(built_workshop, content):
    before = published_files(built_workshop.text)
    empty = built_workshop.text / "empty.safetensors"
    empty.unlink() if content is None else empty.write_bytes(content)
    build_text(built_workshop, repair=True)
    assert published_files(built_workshop.text) == before


def test_a_healthy_set_is_left_alone_when_a_teachers_is_repaired(built_workshop):
    workshop = built_workshop
    before = identities(workshop.text.iterdir())
    min(workshop.teacher.glob("*.tar")).unlink()
    workshop.build_shards("cache.draws=2", repair=True)
    assert identities(workshop.text.iterdir()) == before
    (folder,) = workshop.predictions.glob(".*.withdrawn-*")
    assert folder.name.startswith(f".{workshop.teacher.name}.")


@pytest.mark.parametrize("num_more", [0, 3])
def test_text_of_latents_that_were_built_anew_is_stale(workshop, num_more):
    workshop.build_latents()
    write_images(workshop.images, num_more, first=10)
    workshop.build_latents()
    build_text(workshop)
    (workshop.images / "000.txt").write_text("another caption")
    workshop.build_latents(rebuild=True)
    with pytest.raises(IncompatibleError, match="another latents shard"):
        build_text(workshop)
    build_text(workshop, repair=True)
    assert read_set(workshop.text).keys() == read_set(workshop.latents).keys()


def test_a_latents_sidecar_that_was_changed_is_no_caption(built_workshop):
    workshop = built_workshop
    text = workshop.text
    for path in text.iterdir():
        if path.is_file():
            path.unlink()
    tar = next(workshop.latents.glob("*.tar"))
    tar.write_bytes(tar.read_bytes().replace(b'{"captions":["photo', b'{"captions":["phota'))
    with pytest.raises(CorruptError, match=tar.stem):
        build_text(workshop)
    assert traces(workshop.root) == []
