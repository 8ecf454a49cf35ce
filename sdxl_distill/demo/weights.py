"""Initial weights of the demo's networks, drawn from an explicit generator.

The constructors of diffusers and transformers draw from torch's global generator; what they drew
is replaced here, so that a family depends on its seed alone.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Replace all weights of a network: Kaiming-uniform layers, unit-variance embeddings.

    Args:
        network: any module built of linear, convolution, embedding and normalisation layers;
            normalisation layers keep their ones and zeros.
        generator: the only source of randomness.
    """
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                # The layers' own default (He et al. 2015 with a = √5): uniform in ±1/√fan_in.
                bound = 1 / math.sqrt(layer.weight[0].numel())
                layer.weight.uniform_(-bound, bound, generator=generator)
                if layer.bias is not None:
                    layer.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(layer, nn.Embedding):
                layer.weight.normal_(generator=generator)


def perturb_weights(network: nn.Module, relative_std: float, generator: torch.Generator) -> None:
    """Add Gaussian noise of `relative_std` times each tensor's own root mean square."""
    with torch.no_grad():
        for parameter in network.parameters():
            scale = relative_std * parameter.square().mean().sqrt()
            noise = torch.empty_like(parameter).normal_(generator=generator)
            parameter.add_(noise * scale)
