"""Plain networks: images in [0, 1] in, logits out; the normalisation of the images is part of the network."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["NUM_CLASSES", "Activation", "GlobalPool", "Network", "Norm", "Pooling"]

NUM_CLASSES = 10

Activation = Literal["relu", "gelu", "silu", "leaky_relu"]
GlobalPool = Literal["none", "avg", "max"]
Norm = Literal["batch", "layer", "none"]
Pooling = Literal["max", "avg", "none"]

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}
_GLOBAL_POOLS: dict[GlobalPool, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "avg": lambda: nn.AdaptiveAvgPool2d(1),
    "max": lambda: nn.AdaptiveMaxPool2d(1),
}
_POOLINGS: dict[Pooling, Callable[[], nn.Module]] = {
    "max": lambda: nn.MaxPool2d(2),
    "avg": lambda: nn.AvgPool2d(2),
    "none": nn.Identity,
}
_NORMS_OF_MAPS: dict[Norm, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": lambda num_channels: nn.GroupNorm(1, num_channels),
    "none": lambda _: nn.Identity(),
}
_NORMS_OF_FEATURES: dict[Norm, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "none": lambda _: nn.Identity(),
}


class Network(nn.Module):
    """Compute logits by convolution stages, then dense layers.

    A stage is `convs_per_stage` times convolution, normalisation and activation, with pooling to half the size after
    its first convolution or at its end. Without stages it is a multi-layer perceptron on the pixels.

    Args:
        num_classes: Outputs; all other arguments are those of `ConvNet`.

    Raises:
        ValueError: If there is neither a stage nor a dense layer, if a stage would get a map without pixels, or if a
            residual stage has no padding.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        channels: Sequence[int],
        hidden: Sequence[int],
        kernel_size: int,
        convs_per_stage: int,
        residual: bool,
        pooling: Pooling,
        pool_at_end: bool,
        unpadded_stages: int,
        global_pool: GlobalPool,
        norm: Norm,
        activation: Activation,
        dropout: float,
        image_size: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        if not channels and not hidden:
            raise ValueError("the network is empty: give at least one number in model.channels or in model.hidden")
        if residual and unpadded_stages and convs_per_stage > 1:
            raise ValueError("model.residual needs maps that keep their size\nuse --model.unpadded_stages 0")
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        pool_at_end = pool_at_end and convs_per_stage > 1
        layers: list[nn.Module] = []
        sizes = [image_size]
        for stage, (num_in, num_out) in enumerate(itertools.pairwise([1, *channels])):
            is_padded = stage >= unpadded_stages
            convolution = functools.partial(
                _convolution, kernel_size=kernel_size, is_padded=is_padded, norm=norm, activation=activation
            )
            layers += convolution(num_in, num_out, pooling="none" if pool_at_end else pooling)
            others = [part for _ in range(convs_per_stage - 1) for part in convolution(num_out, num_out)]
            layers += [Residual(*others)] if residual and others else others
            layers += [_POOLINGS[pooling]()] if pool_at_end else []
            border = 0 if is_padded else kernel_size - 1
            num_unpooled = convs_per_stage if pool_at_end else 1
            size = (sizes[-1] - border * num_unpooled) // (1 if pooling == "none" else 2)
            sizes.append(max(0, size - border * (convs_per_stage - num_unpooled)))
        _check_sizes(sizes, unpadded=unpadded_stages > 0)
        num_features = [1, *channels][-1] * sizes[-1] ** 2
        if channels and global_pool != "none":
            layers.append(_GLOBAL_POOLS[global_pool]())
            num_features = channels[-1]
        self.stages = nn.Sequential(*layers)
        widths = [num_features, *hidden, num_classes]
        self.head = nn.Sequential(nn.Flatten(), *_dense(widths, norm, activation, dropout, drop_input=bool(channels)))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of shape (n, num_classes) of images of shape (n, 1, image_size, image_size) in [0, 1]."""
        images = images.to(self.mean.dtype)  # that of the weights, whatever the precision
        logits: Tensor = self.head(self.stages((images - self.mean) / self.std))
        return logits


class Residual(nn.Sequential):
    """Add the output of some layers to their input."""

    def forward(self, maps: Tensor) -> Tensor:
        """Compute maps of shape (n, c, h, w) from maps of the same shape."""
        total: Tensor = maps + super().forward(maps)  # type: ignore[no-untyped-call]
        return total


def _check_sizes(sizes: list[int], *, unpadded: bool) -> None:
    """Make sure that the map before the first stage and after each one has a pixel."""
    if sizes[-1] > 0:
        return
    num_stages = sizes.index(0) - 1
    maps = " -> ".join(f"{size}x{size}" for size in sizes[: num_stages + 2])
    raise ValueError(
        f"{len(sizes) - 1} stages in model.channels leave a 0x0 map ({maps})\n"
        f"use at most {num_stages} stages, a larger data.image_size, or model.pooling: none"
        + (", or less model.unpadded_stages" if unpadded else "")
    )


def _convolution(
    num_in: int,
    num_out: int,
    *,
    kernel_size: int,
    is_padded: bool,
    norm: Norm,
    activation: Activation,
    pooling: Pooling = "none",
) -> list[nn.Module]:
    padding = "same" if is_padded else "valid"
    return [
        nn.Conv2d(num_in, num_out, kernel_size, padding=padding, bias=norm == "none"),
        _POOLINGS[pooling](),
        _NORMS_OF_MAPS[norm](num_out),
        _ACTIVATIONS[activation](),
    ]


def _dense(
    widths: Sequence[int], norm: Norm, activation: Activation, dropout: float, *, drop_input: bool
) -> Iterator[nn.Module]:
    for layer, (num_in, num_out) in enumerate(itertools.pairwise(widths)):
        if dropout and (layer or drop_input):
            yield nn.Dropout(dropout)
        is_output = layer == len(widths) - 2
        yield nn.Linear(num_in, num_out, bias=is_output or norm == "none")
        if not is_output:
            yield _NORMS_OF_FEATURES[norm](num_out)
            yield _ACTIVATIONS[activation]()
