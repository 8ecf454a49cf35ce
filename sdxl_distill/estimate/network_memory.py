"""Device memory that a network's work takes, counted on tensors without storage.

In: a component of a checkpoint, of which only the configuration is read. Out: bytes that are
live now, and the most that ever were live. Every operation runs for its shapes alone, so SDXL is
counted in seconds on any machine. Allocators and libraries add their own on a real device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdxl_distill.models.component import Component
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import UnetInput, predict, unet_geometry


class StorageCount(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return while this mode is on.

    A storage counts once, however many views it has, from the operation that makes it until
    nothing refers to it: autograd's saved tensors are counted as long as they are saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart_peak(self) -> None:
        """Forget earlier peaks."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key not in self._storages:
            forget = partial(self._forget, key, num_bytes)
            self._storages[key] = weakref.ref(storage, forget)
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, num_bytes: int, _reference: object) -> None:
        del self._storages[key]
        self.live_bytes -= num_bytes


@contextmanager
def counted_memory() -> Iterator[StorageCount]:
    """Let every tensor made within the block have a shape and no storage, and count its bytes."""
    # Tensors made before, such as a table of ᾱ, may take part.
    with FakeTensorMode(allow_non_fake_inputs=True), StorageCount() as count:
        yield count


def weightless(component: Component, dtype: torch.dtype) -> nn.Module:
    """Return a network within `counted_memory`, as `Component.load` returns a real one.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when its configuration cannot be used.
    """
    module = component.on_meta()
    weights = {
        name: torch.empty(tensor.shape, dtype=dtype) for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def num_parameters(component: Component) -> int:
    """Return how many weights a network has. Raises as `weightless`."""
    return sum(tensor.numel() for tensor in component.on_meta().state_dict().values())


class ForwardMemory(NamedTuple):
    """Bytes of a network that only predicts: its weights, and the most that a batch adds."""

    weights_bytes: int
    activations_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that is live at once."""
        return self.weights_bytes + self.activations_bytes


def prediction_memory(
    checkpoint: ModelFolder,
    dtype: torch.dtype,
    num_records: int,
    size_px: tuple[int, int],
    num_tokens: int,
) -> ForwardMemory:
    """Count one prediction of a frozen UNet.

    Args:
        checkpoint: the UNet's checkpoint.
        dtype: the dtype of its weights.
        num_records: the number of records that are predicted at once.
        size_px: width and height of the images.
        num_tokens: the tokens of one caption.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when its configuration cannot be used.
    """
    geometry = unet_geometry(checkpoint)
    with counted_memory() as count, torch.no_grad():
        unet = weightless(checkpoint.unet, dtype)
        weights_bytes = count.live_bytes
        asked = UnetInput.zeros(geometry, num_records, size_px, num_tokens)
        predict(unet, asked.latents.to(torch.float32), *asked[1:])
    return ForwardMemory(weights_bytes, count.peak_bytes - weights_bytes)
