"""Plain networks: images in [0, 1] in, logits out; the normalisation of the images is part of the network."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "gelu", "silu", "leaky_relu"]
GlobalPool = Literal["none", "avg", "max"]
Norm = Literal["batch", "layer", "none"]
Pooling = Literal["max", "avg", "none"]
Layer = Callable[..., nn.Module]

# In place, as the layers before it need no output of theirs: a third less memory.
RELU = functools.partial(nn.ReLU, inplace=True)
ACTIVATIONS: dict[Activation, Layer] = {"relu": RELU, "gelu": nn.GELU, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}
GLOBAL_POOLS: dict[GlobalPool, Layer] = {"none": nn.Identity, "avg": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}
POOLINGS: dict[Pooling, Layer] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d, "none": nn.Identity}
GROUP_NORM = functools.partial(nn.GroupNorm, 1)
NORMS_OF_MAPS: dict[Norm, Layer] = {"batch": nn.BatchNorm2d, "layer": GROUP_NORM, "none": nn.Identity}
NORMS_OF_FEATURES: dict[Norm, Layer] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}


class Network(nn.Module):
    """Normalise images, then compute logits by convolution stages and dense layers."""

    mean: Tensor
    std: Tensor

    def __init__(self, stages: nn.Module, head: nn.Module, in_channels: int) -> None:
        super().__init__()
        shape = (in_channels, 1, 1) if in_channels > 1 else ()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.stages = stages
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (n, num_classes) of images (n, in_channels, image_size, image_size) in [0, 1]."""
        images = images.to(self.mean.dtype)  # that of the weights, whatever the precision
        logits: Tensor = self.head(self.stages((images - self.mean) / self.std))
        return logits


class Residual(nn.Sequential):
    """Add the output of some layers to their input."""

    def forward(self, maps: Tensor) -> Tensor:
        """Compute maps of shape (n, c, h, w) from maps of the same shape."""
        total: Tensor = maps + super().forward(maps)  # type: ignore[no-untyped-call]
        return total


def convolution(
    kernel_size: int,
    padding: str,
    norm: Norm,
    activation: Activation,
    num_in: int,
    num_out: int,
    pooling: Pooling = "none",
) -> list[nn.Module]:
    """Build a convolution with what follows it."""
    return [
        nn.Conv2d(num_in, num_out, kernel_size, padding=padding, bias=norm == "none"),
        POOLINGS[pooling](2),
        NORMS_OF_MAPS[norm](num_out),
        ACTIVATIONS[activation](),
    ]


def dense(
    widths: Sequence[int], norm: Norm, activation: Activation, dropout: float, *, drop_input: bool
) -> Iterator[nn.Module]:
    """Build dense layers of these widths, each with dropout before it; the last one computes logits."""
    for layer, (num_in, num_out) in enumerate(itertools.pairwise(widths)):
        if dropout and (layer or drop_input):
            yield nn.Dropout(dropout)
        is_output = layer == len(widths) - 2
        yield nn.Linear(num_in, num_out, bias=is_output or norm == "none")
        if not is_output:
            yield NORMS_OF_FEATURES[norm](num_out)
            yield ACTIVATIONS[activation]()


def num_features(stages: nn.Module, in_channels: int, image_size: int) -> int:
    """Count the values that convolution stages compute from an image."""
    try:
        with torch.no_grad():
            return int(stages.eval()(torch.zeros(1, in_channels, image_size, image_size)).numel())
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        raise ValueError(
            f"the stages of model.channels leave no pixel of images of {image_size}x{image_size}\nuse fewer, a larger "
            "data.image_size, model.pooling: none, or less model.kernel_size or model.unpadded_stages"
        ) from error
    finally:
        stages.train()
