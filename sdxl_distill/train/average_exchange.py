"""How the ranks' shares of the average come together: lent to the student, gathered for a save.

Averages of one owner travel together, in buffers of bounded size: one broadcast for each of 1,680
weights would wait for the network 1,680 times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from sdxl_distill.optimizer.bounded_groups import bounded_groups
from sdxl_distill.train.ema import Ema

_BUFFER_ELEMENTS = 1 << 25


def all_averages(
    ema: Ema, like: Mapping[str, torch.Tensor], accelerator: Accelerator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every average, of any rank, on every rank; all ranks must take all.

    An average of this rank is its own tensor where it is alone, else a part of a buffer, which is
    valid until the next average is asked for.

    Args:
        ema: this rank's share.
        like: a tensor of the shape and dtype that each average is sent in; may be on "meta".
        accelerator: the ranks.
    """
    if accelerator.num_processes == 1:
        yield from ema.averages.items()
        return
    for owner in range(accelerator.num_processes):
        names = [name for name in like if ema.owners[name] == owner]
        for group in bounded_groups(names, lambda name: like[name].numel(), _BUFFER_ELEMENTS):
            sizes = [like[name].numel() for name in group]
            dtype = like[group[0]].dtype
            buffer = torch.empty(sum(sizes), dtype=dtype, device=accelerator.device)
            parts = dict(zip(group, buffer.split(sizes), strict=True))
            for name, part in parts.items():
                if owner == accelerator.process_index:
                    part.view(like[name].shape).copy_(ema.averages[name])
            broadcast(buffer, from_process=owner)
            for name, part in parts.items():
                yield name, part.view(like[name].shape)


@contextmanager
def lent_averages(student: nn.Module, ema: Ema, accelerator: Accelerator) -> Iterator[None]:
    """Give every rank's student the averages, in its own dtype, within the block.

    Args:
        student: this rank's student; its own weights wait in main memory meanwhile.
        ema: this rank's share of the average.
        accelerator: the ranks, all of which must enter.
    """
    weights = {name: weight.detach() for name, weight in student.named_parameters()}
    own = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
    try:
        for name, average in all_averages(ema, weights, accelerator):
            weights[name].copy_(average)
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(own[name])
