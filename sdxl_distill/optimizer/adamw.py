"""AdamW for weights of 16 or 32 bits: float32 arithmetic, small states, no lost updates.

In: parameters with gradients, and the factor that clips them. Out: updated parameters, and states
as flat tensors for a checkpoint. torch's AdamW rounds bfloat16 weights to nearest, so
that at a learning rate of 5e-6 only 3 % of the update arrives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import sqrt
from typing import Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.fingerprint import differing_fields
from sdxl_distill.optimizer.bounded_groups import bounded_groups
from sdxl_distill.optimizer.parameter_update import (
    StepTerms,
    row_update,
    step_in_place,
)
from sdxl_distill.optimizer.state_codec import block_elements
from sdxl_distill.optimizer.stochastic_rounding import (
    RANDOM_BITS_ALGORITHM,
    int32_scalar,
    rounding_key,
)

States = Literal["fp32", "8bit"]

_WEIGHT_STREAM, _STATE_STREAM = 0, 1
_STEPS = "steps"
_CPU_CHUNK_ELEMENTS = 1 << 18
_GPU_CHUNK_ELEMENTS = 1 << 22
_COMPILED_CHUNK_ELEMENTS = 1 << 24


class AdamW(torch.optim.Optimizer):
    """AdamW whose result depends on gradients and step alone, never on ranks or chunks.

    Random bits are a hash of seed, step, parameter number and element. Learning rate, betas, eps
    and weight decay are read from the parameter groups at every step, where torch's schedulers
    change them; they are configuration and not part of the saved state.

    Args:
        params: parameters as torch's optimizers take them, on their device;
            `model.named_parameters()` gives the saved tensors names instead of numbers.
        lr: learning rate.
        betas: decay rates of the first and the second moment.
        eps: summand of the second moment's root.
        weight_decay: decoupled decay: a step takes `lr * weight_decay` of each weight off it, in
            one sum with the update. A weight without an update loses nothing to a decay below half
            its last float32 bit, 3e-8 to 6e-8 of it.
        states: "fp32", 8 bytes per element, or "8bit", about 2.05. Small tensors and vectors
            keep float32 states (`state_codec.block_elements`).
        exact_masters: true keeps the float32 value of each bfloat16 weight as 16 more bits; weights
            are then rounded to nearest, and stochastic rounding is not needed.
        seed: seed of the random bits.
        chunk_elements: approximate number of elements that are updated at once, which bounds
            temporary memory and changes no result. None: what a CPU's cache holds, or 4 million
            on a GPU, 16 million where compiled, which needs fewer temporaries.
        compiled: true fuses the arithmetic with torch.compile: a few kernels for each slice
            instead of a hundred. The last bits of the result may differ then.

    Raises:
        ConfigError: for weights other than float32, bfloat16 and float16, and for
            `exact_masters` with float16.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2,
    with the learning rate as the schedule multiplier, as in torch.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        states: States = "fp32",
        exact_masters: bool = False,
        seed: int = 0,
        chunk_elements: int | None = None,
        compiled: bool = False,
    ) -> None:
        self._states: States = states
        self._exact_masters = exact_masters
        self._seed = seed
        self._chunk_elements = chunk_elements
        self._is_compiled = compiled
        self._steps: list[int] = []
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do, and its states, which are zero."""
        super().add_param_group(param_group)
        for _, name, parameter, _ in list(self._entries())[len(self._steps) :]:
            self._check_dtype(name, parameter)
            self.state[parameter] = self._zero_state(parameter)
            self._steps.append(0)

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] - no closure, a factor instead
        self, grad_scale: float | torch.Tensor = 1.0
    ) -> None:
        """Update every parameter that has a gradient, without waiting for the device.

        Args:
            grad_scale: factor for all gradients, as from `clip_factor`; a scalar tensor must be
                on the parameters' device or the CPU.
        """
        # Large and 16-bit parameters one by one; the others wait until all are known.
        scale = torch.as_tensor(grad_scale, dtype=torch.float32)
        terms: dict[tuple[int, int], StepTerms] = {}
        alike: dict[tuple[int, int], list[torch.Tensor]] = {}
        for number, _, parameter, group in self._entries():
            if parameter.grad is None:
                continue
            self._steps[number] += 1
            key = id(group), self._steps[number]
            if key not in terms:
                terms[key] = group_terms(group, self._steps[number], scale)
            if self._is_small_and_exact(parameter, parameter.grad):
                alike.setdefault(key, []).append(parameter)
            else:
                self._update(parameter, parameter.grad, self._keyed(terms[key], number))

        # Small float32 parameters of one group and step together.
        for key, parameters in alike.items():
            self._update_together(parameters, terms[key])

    def remainder(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the 16 bits that a bfloat16 parameter lacks, int16 of its shape, if it has them.

        Together they are its exact value (`stochastic_rounding.join_master`). It is the
        optimizer's own tensor: read it before the next step.
        """
        remainder = self.state[parameter].get("remainder")
        return None if remainder is None else remainder.view(parameter.shape)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the whole state except `state_scalars` as flat names and tensors.

        The tensors are the optimizer's own, not copies: write them before the next step.

        Returns:
            `{parameter}/{state}` for each, and `steps`, int64 [parameters].
        """
        tensors = {
            f"{name}/{state_name}": tensor
            for _, name, parameter, _ in self._entries()
            for state_name, tensor in self.state[parameter].items()
        }
        return {_STEPS: torch.tensor(self._steps, dtype=torch.int64), **tensors}

    def state_scalars(self) -> dict[str, Any]:
        """Return what else determines the state's meaning, as JSON values."""
        return {
            "states": self._states,
            "exact_masters": self._exact_masters,
            "seed": self._seed,
            "random_bits_algorithm": RANDOM_BITS_ALGORITHM,
        }

    def load_state_tensors(
        self, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]
    ) -> None:
        """Copy in what `state_tensors` and `state_scalars` gave; nothing changes on an error.

        Raises:
            IncompatibleError: when it is the state of an optimizer with other settings or for
                other parameters; names what differs.
            CorruptError: when a value cannot have come from a successful step.
        """
        differences = differing_fields(dict(scalars), self.state_scalars())
        if differences:
            raise _incompatible(
                ", ".join(f"{name} {found!r}" for name, found, _ in differences),
                ", ".join(f"{name} {expected!r}" for name, _, expected in differences),
            )
        own = self.state_tensors()
        _check_same_layout(tensors, own)
        _check_values(tensors)
        self._steps = tensors[_STEPS].tolist()
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse: torch's loader casts states to the weights' dtype, which destroys them.

        Raises:
            IncompatibleError: always.
        """
        del state_dict
        raise _incompatible("a state for torch's load_state_dict", "one for load_state_tensors")

    def _entries(self) -> Iterator[tuple[int, str, torch.Tensor, dict[str, Any]]]:
        """Yield number, name, parameter and group of all parameters, numbered from 0."""
        number = 0
        for group in self.param_groups:
            names: Sequence[str | None] = group.get("param_names") or [None] * len(group["params"])
            for name, parameter in zip(names, group["params"], strict=True):
                yield number, name or f"{number}", parameter, group
                number += 1

    def _check_dtype(self, name: str, parameter: torch.Tensor) -> None:
        allowed = [torch.float32, torch.bfloat16]
        if not self._exact_masters:
            allowed.append(torch.float16)
        if parameter.dtype not in allowed:
            raise ConfigError(
                f"weights of {parameter.dtype}",
                expected=" or ".join(map(str, allowed)),
                where=f"optimizer, parameter {name}",
                action="convert the model, or train without exact masters",
            )

    def _zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make the state tensors of one parameter, [rows, elements of a row or blocks in it]."""
        num_rows, row_elements = _rows(parameter)
        block = self._block(parameter)

        def zeros(dtype: torch.dtype, num_columns: int = row_elements) -> torch.Tensor:
            return torch.zeros(num_rows, num_columns, dtype=dtype, device=parameter.device)

        state: dict[str, torch.Tensor] = {}
        if block is None:
            state["exp_avg"] = zeros(torch.float32)
            state["exp_avg_sq"] = zeros(torch.float32)
        else:
            for name in ("exp_avg", "exp_avg_sq_root"):
                state[f"{name}_codes"] = zeros(torch.uint8)
                state[f"{name}_scales"] = zeros(torch.float32, row_elements // block)
        if self._exact_masters and parameter.dtype == torch.bfloat16:
            state["remainder"] = zeros(torch.int16)
        return state

    def _block(self, parameter: torch.Tensor) -> int | None:
        return block_elements(parameter.shape) if self._states == "8bit" else None

    def _keyed(self, terms: StepTerms, number: int) -> StepTerms:
        """Return the terms with the random bits of one parameter."""
        step = self._steps[number]
        return terms._replace(
            weight_key=rounding_key(self._seed, step, number, _WEIGHT_STREAM),
            state_key=rounding_key(self._seed, step, number, _STATE_STREAM),
        )

    def _is_small_and_exact(self, parameter: torch.Tensor, grad: torch.Tensor) -> bool:
        """Whether a parameter is float32 throughout and may be updated together with others."""
        return (
            parameter.dtype == torch.float32
            and "exp_avg" in self.state[parameter]
            and parameter.numel() <= self._max_elements(parameter)
            and parameter.is_contiguous()
            and grad.is_contiguous()
        )

    def _update_together(self, parameters: list[torch.Tensor], terms: StepTerms) -> None:
        """Update small parameters in groups, each as large as a slice of a large parameter."""
        limit = self._max_elements(parameters[0])
        for group in bounded_groups(parameters, torch.Tensor.numel, limit):
            states = [self.state[parameter] for parameter in group]
            shapes = [state["exp_avg"].shape for state in states]
            gradients = [parameter.grad for parameter in group if parameter.grad is not None]
            step_in_place(
                list(map(torch.Tensor.view, group, shapes)),
                list(map(torch.Tensor.view, gradients, shapes)),
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                terms,
            )

    def _max_elements(self, parameter: torch.Tensor) -> int:
        """Return how many elements are updated at once."""
        if self._chunk_elements is not None:
            return self._chunk_elements
        if parameter.device.type == "cpu":
            return _CPU_CHUNK_ELEMENTS
        return _COMPILED_CHUNK_ELEMENTS if self._is_compiled else _GPU_CHUNK_ELEMENTS

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, terms: StepTerms) -> None:
        weight, grad = torch.atleast_1d(parameter, grad)
        state = self.state[parameter]
        update_rows = row_update(self._block(parameter), compiled=self._is_compiled)
        num_rows, row_elements = _rows(parameter)
        rows_per_chunk = max(1, self._max_elements(weight) // row_elements)
        for first_row in range(0, num_rows, rows_per_chunk):
            rows = slice(first_row, first_row + rows_per_chunk)
            # Weights need not be contiguous: a reshape may copy, so results are written here.
            new_weight, new_state = update_rows(
                weight[rows].reshape(-1, row_elements),
                grad[rows].reshape(-1, row_elements),
                {name: tensor[rows] for name, tensor in state.items()},
                terms,
                int32_scalar(first_row * row_elements),
            )
            weight[rows].copy_(new_weight.view(weight[rows].shape))
            for name, tensor in new_state.items():
                state[name][rows].copy_(tensor)


def global_grad_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of all gradients together, a float32 scalar tensor.

    Accumulated in float32 even where gradients have 16 bits; torch's clipping would give such a
    norm in 16 bits. Parameters without a gradient do not count; at least one must have one.
    """
    # Row by row: one sum over millions of squares loses the fourth digit.
    norms = [
        torch.linalg.vector_norm(
            torch.atleast_2d(parameter.grad).flatten(1), dim=1, dtype=torch.float32
        )
        for parameter in parameters
        if parameter.grad is not None
    ]
    return torch.linalg.vector_norm(torch.cat(norms))


def clip_factor(grad_norm: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """Return the factor in (0, 1] for `AdamW.step` that brings the norm to `max_grad_norm`.

    A norm of NaN gives NaN and an infinite one 0: look at the norm before stepping.
    """
    return (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)


def group_terms(group: dict[str, Any], step: int, grad_scale: torch.Tensor) -> StepTerms:
    """Return the terms of a step for a parameter group, without the random bits of a parameter."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    return StepTerms(
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        step_size=_scalar(lr / (1 - beta1**step)),
        decay=_scalar(lr * group["weight_decay"]),
        root_correction=_scalar(sqrt(1 - beta2**step)),
        grad_scale=grad_scale,
        weight_key=rounding_key(),
        state_key=rounding_key(),
    )


def _scalar(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float32)


def _rows(parameter: torch.Tensor) -> tuple[int, int]:
    """Return the first dimension and the number of elements that share an index of it."""
    num_rows = parameter.shape[0] if parameter.dim() else 1
    return num_rows, parameter.numel() // num_rows


def _check_same_layout(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Raise IncompatibleError for the first tensor missing, extra or of another dtype or shape."""
    for problem, names in (
        ("missing", expected.keys() - found.keys()),
        ("unknown", found.keys() - expected.keys()),
    ):
        if names:
            raise _incompatible(
                f"{len(names)} {problem} tensors, first {min(names)!r}",
                f"the {len(expected)} tensors of this optimizer",
            )
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype or found[name].shape != tensor.shape:
            raise _incompatible(f"{name} is {_layout(found[name])}", _layout(tensor))


def _check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CorruptError for negative steps and for moments or scales that are not finite."""
    for name, tensor in tensors.items():
        plausible = tensor.isfinite() if tensor.is_floating_point() else tensor >= 0
        if (name == _STEPS or tensor.is_floating_point()) and not plausible.all():
            raise CorruptError(
                f"{name} holds {tensor[~plausible][0].item()}",
                expected="finite moments and steps from 0",
                where="optimizer state",
                action="resume from an earlier checkpoint",
            )


def _layout(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _incompatible(found: str, expected: str) -> IncompatibleError:
    return IncompatibleError(
        found,
        expected=expected,
        where="optimizer state",
        action="resume with the configuration and student that the checkpoint was made with",
    )
