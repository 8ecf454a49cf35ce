"""One network of a checkpoint: its folder, its exact tensor names and shapes, its weights.

In: a folder with `config.json` and safetensors. Out: a fingerprint, or the module.
The libraries leave missing tensors uninitialised and drop extra ones without an error, so the
module is built without memory first and compared with the files, name by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.models.component_kind import ComponentKind
from sdxl_distill.models.fingerprint_memory import remembered
from sdxl_distill.models.json_files import read_json
from sdxl_distill.models.tensor_files import (
    StoredTensor,
    name_list,
    read_tensor,
    read_tensors,
    stored_tensors,
    tensor_digests,
)


class Component:
    """One network's folder; nothing is read until it is asked for.

    Args:
        kind: the network that it must be.
        folder: the folder of its `config.json` and its weights.
    """

    def __init__(self, kind: ComponentKind, folder: Path) -> None:
        self.kind = kind
        self.folder = folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed `config.json`.

        Raises:
            ConfigError, CorruptError: when it is missing or cannot be read.
            IncompatibleError: when it describes another class.
        """
        config = read_json(self.folder / "config.json")
        class_name = config.get("_class_name") or (config.get("architectures") or [None])[0]
        if class_name != self.kind.class_name:
            raise IncompatibleError(
                f"config.json describes the class {class_name}",
                expected=self.kind.class_name,
                where=str(self.folder),
                action="use an SDXL checkpoint",
            )
        return config

    def field(self, name: str) -> Any:
        """Return one field of the configuration, or its default. Raises as `config`."""
        return self.config.get(name, self.kind.defaults[name])

    def size(self, name: str) -> int:
        """Return a field that must be a whole number above zero.

        Raises:
            ConfigError, CorruptError: as `config`; IncompatibleError when it is not.
        """
        size = self.field(name)
        if type(size) is not int or size < 1:
            raise IncompatibleError(
                f"config.json says that {name} is {size!r}",
                expected="a whole number above zero",
                where=str(self.folder),
                action="use an SDXL checkpoint",
            )
        return size

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The stored tensors by the name they have in every library version.

        Raises:
            ConfigError, CorruptError, IncompatibleError: as `stored_tensors`.
        """
        stored = stored_tensors(self.folder, self.kind.weights_stem)
        tensors = {self.kind.plain_name(name): tensor for name, tensor in stored.items()}
        return {
            name: tensor for name, tensor in tensors.items() if name not in self.kind.legacy_names
        }

    def require_complete(self) -> None:
        """Check that the stored tensors are exactly those of the network in `config.json`.

        Raises:
            ConfigError, CorruptError, IncompatibleError: as `tensors`; IncompatibleError also
                for a tensor that is missing, unknown or of another shape.
        """
        shapes = {
            self.kind.plain_name(name): tuple(tensor.shape)
            for name, tensor in self.on_meta().state_dict().items()
        }
        self._compare(self.tensors, shapes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor (name, dtype, shape, bytes) and each field without its default.

        Equal for the same weights in one file or many, whichever library version wrote them.
        `require_complete` checks that they are all there. Remembered while the files are unchanged.

        Raises:
            ConfigError, CorruptError, IncompatibleError: as `tensors`; CorruptError also for
                weights that are NaN or infinite, before anything is built of them.
        """
        fields = {
            name: self.field(name)
            for name, default in self.kind.defaults.items()
            if self.field(name) != default
        }
        return remembered(
            (stored.path for stored in self.tensors.values()),
            {"network": self.kind.name, "fields": fields},
            lambda: self._computed_fingerprint(fields),
        )

    def _computed_fingerprint(self, fields: Mapping[str, Any]) -> str:
        digests = tensor_digests(self.tensors)
        self._require_finite(name for name, digest in digests.items() if not digest.is_finite)
        tensors = {
            name: [stored.dtype, list(stored.shape), digests[name].sha256]
            for name, stored in self.tensors.items()
        }
        return fingerprint({"fields": fields, "tensors": tensors})

    def on_meta(self) -> nn.Module:
        """Return the network that the configuration describes, without memory for its weights.

        Raises:
            ConfigError, CorruptError: as `config`; IncompatibleError when it does not describe one.
        """
        with torch.device("meta"):
            return self._build()

    def load(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """Return the network in evaluation mode, frozen, with exactly the stored weights.

        Args:
            dtype: the dtype that every weight is converted to.
            device: the device that each tensor goes to as soon as it is read, so that memory
                holds the network once and one more tensor.

        Raises:
            ConfigError, CorruptError, IncompatibleError: as `require_complete`; CorruptError
                also for weights that are NaN or infinite.
        """
        self.require_complete()
        # Sizes are known to match the files by now; buffers that no file holds get real memory.
        with init_empty_weights(include_buffers=False):
            module = self._build()
        module_names = {self.kind.plain_name(name): name for name in module.state_dict()}
        weights: dict[str, torch.Tensor] = {}
        not_finite: list[str] = []
        for name, tensor in read_tensors(self.tensors):
            if not _all_finite(tensor):
                not_finite.append(name)
            # Two steps, since a processor converts half precision slowly and a GPU does not.
            weights[module_names[name]] = tensor.to(device).to(dtype)
        self._require_finite(not_finite)
        module.load_state_dict(weights, assign=True)
        return module.to(device).requires_grad_(False).eval()

    def hub_tensors(self) -> dict[str, StoredTensor]:
        """Return where every tensor is stored, by its name in the hub's files.

        Raises:
            ConfigError, CorruptError, IncompatibleError: as `require_complete`.
        """
        self.require_complete()
        return {self.kind.hub_name(name): stored for name, stored in self.tensors.items()}

    def finite_weight(self, stored: StoredTensor) -> torch.Tensor:
        """Read one tensor as it is stored, bit for bit.

        Raises:
            CorruptError: when it is cut short, or holds NaN or infinity.
        """
        tensor = read_tensor(stored)
        if not _all_finite(tensor):
            self._require_finite(n for n, each in self.tensors.items() if each is stored)
        return tensor

    def _build(self) -> nn.Module:
        config = self.config
        try:
            return self.kind.build(config)
        except Exception as error:
            raise IncompatibleError(
                f"config.json does not describe a {self.kind.class_name} ({error})",
                where=str(self.folder),
                action="use an SDXL checkpoint, or copy its folder again",
            ) from error

    def _require_finite(self, not_finite: Iterable[str]) -> None:
        names = list(not_finite)
        if names:
            raise CorruptError(
                f"{len(names)} tensors hold NaN or infinity: {name_list(names)}",
                expected="finite weights",
                where=str(self.folder),
                action="use an earlier save of this network; this one is broken",
            )

    def _compare(
        self, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        missing, extra = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
        misshapen = {
            f"{name} {list(tensors[name].shape)} instead of {list(shapes[name])}"
            for name in shapes.keys() & tensors.keys()
            if tensors[name].shape != shapes[name]
        }
        faults = [
            f"{len(names)} tensors {fault}: {name_list(names)}"
            for fault, names in (
                ("missing", missing),
                ("too many", extra),
                ("of another shape", misshapen),
            )
            if names
        ]
        if faults:
            raise IncompatibleError(
                "; ".join(faults),
                expected=f"exactly the {len(shapes)} tensors of the network in config.json",
                where=str(self.folder),
                action="use a complete SDXL checkpoint; merge adapters before saving it",
            )


def channels_last_on_gpu(module: nn.Module) -> nn.Module:
    """Lay out a convolutional network as a GPU's kernels want it; on a CPU leave it alone.

    In place. Values and shapes stay; code that saves the weights makes them contiguous.
    """
    if next(module.parameters()).is_cuda:
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module


def _all_finite(tensor: torch.Tensor) -> bool:
    """Check the extremes, which NaN and infinity reach: 20 times faster than every element."""
    if tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
