"""Blocks of memory: what lies where, and when a block is used again."""

from __future__ import annotations

import gc
import tracemalloc

import torch

from sdxl_distill.stream.batch import BatchLayout, BatchMemory

LAYOUT = BatchLayout.of(
    [
        (torch.float16, (3, 4, 5), 1208),
        (torch.int32, (3, 6), 8),
        (torch.bfloat16, (3, 7), 500),
        (torch.int64, (3,), 0),
    ]
)


def memory(max_free: int = 4) -> BatchMemory:
    return BatchMemory(max_free=max_free, pin_memory=False)


def address(tensors: tuple[torch.Tensor, ...]) -> int:
    return tensors[0].data_ptr()


def test_tensors_have_the_shapes_and_dtypes_of_the_layout() -> None:
    tensors = memory().take(LAYOUT).tensors
    assert [tuple(each.shape) for each in tensors] == [(3, 4, 5), (3, 6), (3, 7), (3,)]
    assert [each.dtype for each in tensors] == [place.dtype for place in LAYOUT.places]
    assert all(each.is_contiguous() for each in tensors)


def test_a_tensor_begins_in_the_cache_line_of_512_bytes_that_it_has_in_the_file() -> None:
    tensors = memory().take(LAYOUT).tensors
    lines = [tensor.data_ptr() % 512 for tensor in tensors]
    assert lines == [1208 % 512 // 64 * 64, 0, 500 // 64 * 64, 0]


def test_a_row_of_the_content_is_the_row_of_its_tensor_alone() -> None:
    content, tensors = memory().take(LAYOUT)
    for place, tensor in zip(LAYOUT.places, tensors, strict=True):
        for each in tensors:
            each.zero_()
        content[place.row(1)] = b"\x01" * place.row_bytes
        written = [each.reshape(3, -1).ne(0).all(1).tolist() for each in tensors]
        assert written == [[False, each is tensor, False] for each in tensors]


def test_a_block_is_used_again_when_its_tensors_are_gone() -> None:
    blocks = memory()
    tensors = blocks.take(LAYOUT).tensors
    first = address(tensors)
    del tensors
    gc.collect()
    assert address(blocks.take(LAYOUT).tensors) == first


def test_a_view_of_one_tensor_keeps_the_block_in_use() -> None:
    blocks = memory()
    view = blocks.take(LAYOUT).tensors[1][2:].numpy()
    gc.collect()
    view[:] = 7
    other = blocks.take(LAYOUT).tensors
    for tensor in other:
        tensor.zero_()
    assert (view == 7).all()


def test_a_free_block_that_is_too_small_is_not_used() -> None:
    blocks = memory()
    blocks.take(LAYOUT)
    large = BatchLayout.of([(torch.uint8, (5 << 20,), 0)])
    gc.collect()
    content, (tensor,) = blocks.take(large)
    assert tensor.numel() == 5 << 20
    assert len(content) >= 5 << 20


def test_no_more_free_blocks_are_kept_than_asked_for() -> None:
    blocks = memory(max_free=1)
    layout = BatchLayout.of([(torch.uint8, (8 << 20,), 0)])
    tracemalloc.start()
    taken = [blocks.take(layout) for _ in range(3)]
    assert tracemalloc.get_traced_memory()[0] > 24 << 20
    taken.clear()
    gc.collect()
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 8 << 20 <= kept_bytes < 9 << 20
