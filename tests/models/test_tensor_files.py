from __future__ import annotations

import hashlib
import json
import os
import struct

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.models.tensor_files import (
    MAX_HEADER_BYTES,
    name_list,
    read_header,
    read_tensors,
    stored_tensors,
    tensor_digests,
)

STEM = "diffusion_pytorch_model"
TENSORS = {
    "half": torch.arange(6, dtype=torch.float16).view(2, 3),
    "brain": torch.full((4,), -1.5, dtype=torch.bfloat16),
    "single": torch.linspace(0, 1, 7),
    "double": torch.tensor(0.1, dtype=torch.float64),
    "empty": torch.empty(0, 5),
}


def write_raw(path, header, payload=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + payload)


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_names_types_and_shapes_are_those_that_safetensors_reads(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    ours = read_header(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as theirs:
        expected = {
            name: (theirs.get_slice(name).get_dtype(), tuple(theirs.get_slice(name).get_shape()))
            for name in theirs.keys()  # noqa: SIM118 - no mapping
        }
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()} == expected


def test_tensors_are_those_that_safetensors_loads(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    ours = dict(read_tensors(read_header(tmp_path / "x.safetensors")))
    theirs = load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_tensors_larger_than_one_read_arrive_whole(tmp_path):
    large = torch.arange(3 << 20, dtype=torch.float32)
    save_file({"large": large}, tmp_path / "x.safetensors")
    ((_, tensor),) = read_tensors(read_header(tmp_path / "x.safetensors"))
    assert torch.equal(tensor, large)


def test_digests_are_the_sha256_of_the_tensors_bytes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    expected = {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in TENSORS.items()
    }
    digests = tensor_digests(read_header(tmp_path / "x.safetensors"))
    assert {name: digest.sha256 for name, digest in digests.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", ["max", "min", "nan", "-nan", "inf", "-inf"])
def test_digests_tell_whether_a_tensor_is_finite(tmp_path, dtype, value):
    limits = {name: getattr(torch.finfo(dtype), name) for name in ("max", "min")}
    number = limits[value] if value in limits else float(value.removeprefix("-"))
    tensor = torch.linspace(-1, 1, 1001, dtype=dtype)
    tensor[500] = -number if value.startswith("-") else number
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    digest = tensor_digests(read_header(tmp_path / "x.safetensors"))["x"]
    assert digest.is_finite == bool(tensor.isfinite().all()) == (value in limits)


def test_sharded_weights_are_the_same_tensors_as_one_file(folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one, many = stored_tensors(folder / "unet", STEM), stored_tensors(tmp_path / "sharded", STEM)
    assert tensor_digests(many) == tensor_digests(one)


@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
def test_half_precision_variants_of_diffusers_are_found(folder, tmp_path, shard_size):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float16)
    unet.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size=shard_size)
    tensors = stored_tensors(tmp_path / "half", STEM)
    assert {tensor.dtype for tensor in tensors.values()} == {"F16"}
    assert tensors.keys() == unet.state_dict().keys()


def test_full_precision_is_taken_when_a_half_precision_variant_lies_beside_it(tmp_path):
    save_file({"weight": torch.ones(2).half()}, tmp_path / f"{STEM}.fp16.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / f"{STEM}.safetensors")
    assert stored_tensors(tmp_path, STEM)["weight"].dtype == "F32"


def test_weights_in_one_file_and_sharded_at_once_are_refused(folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.save_pretrained(tmp_path, max_shard_size="300KB")
    (tmp_path / f"{STEM}.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"both .* are there"):
        stored_tensors(tmp_path, STEM)


def test_pickled_weights_are_refused_with_the_reason_and_the_way_out(tmp_path):
    (tmp_path / f"{STEM}.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ConfigError, match=r"can run code(.|\n)*safe_serialization"):
        stored_tensors(tmp_path, STEM)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no weights"):
        stored_tensors(tmp_path, STEM)


MALFORMED = {
    "no JSON": b"{",
    "a list": b"[]",
    "a name twice": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
    b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "a gap": {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},
    "an overlap": {"a": entry(0, 8, [2]), "b": entry(4, 8, [1])},
    "bytes left over": {"a": entry(0, 4, [1])},
    "beyond the end": {"a": entry(0, 4096, [1024])},
    "a size that is not the shape's": {"a": entry(0, 8, [3])},
    "a huge shape": {"a": entry(0, 8, [0, 2**60]), "b": entry(0, 8, [2**60, 2**60])},
    "a negative extent": {"a": entry(0, 8, [-1, -2])},
    "an extent that is a truth value": {"a": entry(0, 8, [True, 2])},
    "a negative offset": {"a": entry(-8, 0, [2])},
    "three offsets": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
    "a field too many": {"a": {**entry(0, 8, [2]), "more": 1}},
    "a field too few": {"a": {"dtype": "F32", "shape": [2]}},
}


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_header_that_does_not_describe_its_file_is_corrupt(tmp_path, header):
    write_raw(tmp_path / "x.safetensors", header, b"\0" * 8)
    with pytest.raises(CorruptError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_a_type_that_is_not_known_is_incompatible(tmp_path):
    write_raw(tmp_path / "x.safetensors", {"a": entry(0, 8, [2], "F13")}, b"\0" * 8)
    with pytest.raises(IncompatibleError, match="F13"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("num_bytes", [2**63, MAX_HEADER_BYTES + 1, 9, 0])
def test_a_header_length_outside_the_file_or_the_limit_is_corrupt(tmp_path, num_bytes):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", num_bytes) + b"{}      ")
    with pytest.raises(CorruptError, match="a header of"):
        read_header(tmp_path / "x.safetensors")


def test_a_file_cut_at_any_byte_is_corrupt(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for num_bytes in range(len(content)):
        (tmp_path / "cut.safetensors").write_bytes(content[:num_bytes])
        with pytest.raises(CorruptError):
            read_header(tmp_path / "cut.safetensors")


def test_a_file_cut_after_its_header_was_read_is_corrupt(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", tensors["a"].offset + 8)
    with pytest.raises(CorruptError, match="cut while"):
        list(read_tensors(tensors))


@pytest.mark.timeout(60)
def test_a_fifo_in_place_of_the_weights_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / f"{STEM}.safetensors")
    with pytest.raises(CorruptError, match="not a regular file"):
        stored_tensors(tmp_path, STEM)


def test_quantised_weights_are_incompatible_with_their_count(tmp_path):
    quantised = {name: torch.ones(2).to(torch.float8_e4m3fn) for name in "abcde"}
    save_file(quantised, tmp_path / f"{STEM}.safetensors")
    with pytest.raises(IncompatibleError, match="5 tensors are stored as F8_E4M3: a, b, c and 2"):
        list(read_tensors(stored_tensors(tmp_path, STEM)))


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/x.safetensors", "x.bin", 7])
def test_an_index_that_names_a_file_elsewhere_is_corrupt(tmp_path, place):
    index = {"weight_map": {"a": place}}
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match="the file name"):
        stored_tensors(tmp_path, STEM)


def test_an_index_without_a_weight_map_is_corrupt(tmp_path):
    (tmp_path / f"{STEM}.safetensors.index.json").write_text("{}")
    with pytest.raises(CorruptError, match="weight_map"):
        stored_tensors(tmp_path, STEM)


def test_a_shard_that_does_not_hold_what_the_index_says_is_corrupt(tmp_path):
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "c": "x.safetensors"}}
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match="b, c"):
        stored_tensors(tmp_path, STEM)


def test_a_missing_shard_is_corrupt(tmp_path):
    index = {"weight_map": {"a": "x.safetensors"}}
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match="missing"):
        stored_tensors(tmp_path, STEM)


def test_a_long_list_of_names_is_cut_with_a_count():
    assert name_list("cab") == "a, b, c"
    assert name_list("edcba") == "a, b, c and 2 more"
