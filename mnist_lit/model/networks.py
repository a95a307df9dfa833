"""Plain networks: images in [0, 1] in, logits out; the normalisation is part of the network."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["NUM_CLASSES", "Activation", "GlobalPool", "Network", "Norm", "Pooling", "map_sizes"]

NUM_CLASSES = 10

Activation = Literal["relu", "gelu", "silu", "leaky_relu"]
GlobalPool = Literal["none", "avg", "max"]
Norm = Literal["batch", "layer", "none"]
Padding = Literal["same", "valid"]
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


class Network(nn.Module):
    """Convolution stages, then dense layers, then one output per class.

    A stage is `convs_per_stage` times convolution, normalisation and activation, and pooling to half the size: at its
    end, or after its first convolution, so that all that comes then has a quarter of the work.
    Without stages it is a multi-layer perceptron on the pixels.

    Args:
        channels: Output channels of each stage; empty for none.
        hidden: Units of each dense layer; empty for none.
        kernel_size: Side of the convolution kernels, in pixels; padded, so that the maps keep their size.
        convs_per_stage: Convolutions in each stage.
        residual: Whether a stage adds what its first convolution makes to what the others make of that.
        pooling: What halves the map in each stage.
        pool_at_end: Whether that is done at the end of a stage instead of after its first convolution.
        unpadded_stages: Stages, from the first, whose kernels stay inside the map, which loses its border by that.
        global_pool: What reduces the last map to one value per channel; `none` keeps every pixel of it.
        norm: Normalisation after each convolution and dense layer.
        activation: Non-linearity after each normalisation.
        dropout: Probability with which a feature is dropped before each dense layer and before the output.
        image_size: Side of the square input, in pixels.

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
        for stage, (num_in, num_out) in enumerate(itertools.pairwise([1, *channels])):
            padding: Padding = "valid" if stage < unpadded_stages else "same"
            layer = functools.partial(
                _convolution, kernel_size=kernel_size, padding=padding, norm=norm, activation=activation
            )
            layers += layer(num_in, num_out, pooling="none" if pool_at_end else pooling)
            others = [part for _ in range(convs_per_stage - 1) for part in layer(num_out, num_out, pooling="none")]
            layers += [Residual(*others)] if residual and others else others
            layers += [_POOLINGS[pooling]()] if pool_at_end else []
        convs_before = convs_per_stage if pool_at_end else 1
        lost = ((kernel_size - 1) * convs_before, (kernel_size - 1) * (convs_per_stage - convs_before))
        last_size = map_sizes(image_size, len(channels), pooling, unpadded_stages, lost)[-1]
        num_features = [1, *channels][-1] * last_size**2
        if channels and global_pool != "none":
            layers.append(_GLOBAL_POOLS[global_pool]())
            num_features = channels[-1]
        self.stages = nn.Sequential(*layers)
        widths = [num_features, *hidden, NUM_CLASSES]
        self.head = nn.Sequential(nn.Flatten(), *_dense(widths, norm, activation, dropout, drop_input=bool(channels)))

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (n, 1, image_size, image_size) in [0, 1] to logits of shape (n, 10)."""
        images = images.to(self.mean.dtype)  # that of the weights, whatever the precision
        logits: Tensor = self.head(self.stages((images - self.mean) / self.std))
        return logits


class Residual(nn.Sequential):
    """Layers whose output is added to their input."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of shape (n, c, h, w) to maps of the same shape."""
        total: Tensor = maps + super().forward(maps)  # type: ignore[no-untyped-call]
        return total


def map_sizes(
    image_size: int,
    num_stages: int,
    pooling: Pooling,
    unpadded_stages: int = 0,
    lost: tuple[int, int] = (0, 0),
) -> list[int]:
    """Side of the map before the first stage and after each one, in pixels.

    Args:
        image_size: Side of the image, in pixels.
        num_stages: Stages.
        pooling: What halves the map in each of them.
        unpadded_stages: How many of them, from the first, have no padding.
        lost: Pixels that a side loses in one of these before pooling, and after it.

    Raises:
        ValueError: If a map would have no pixel left.
    """
    sizes = [image_size]
    for stage in range(num_stages):
        before, after = lost if stage < unpadded_stages else (0, 0)
        size = sizes[-1] - before
        sizes.append(max(0, (size if pooling == "none" else size // 2) - after))
    if sizes[-1] == 0:
        maps = " -> ".join(f"{size}x{size}" for size in sizes[: sizes.index(0) + 1])
        raise ValueError(
            f"{num_stages} stages in model.channels leave a 0x0 map ({maps})\n"
            f"use at most {sizes.index(0) - 1} stages, a larger data.image_size, or model.pooling: none"
            + (", or less model.unpadded_stages" if unpadded_stages else "")
        )
    return sizes


def _convolution(
    num_in: int,
    num_out: int,
    *,
    kernel_size: int,
    padding: Padding,
    pooling: Pooling,
    norm: Norm,
    activation: Activation,
) -> list[nn.Module]:
    return [
        nn.Conv2d(num_in, num_out, kernel_size, padding=padding, bias=norm == "none"),
        _POOLINGS[pooling](),
        _norm_of_maps(norm, num_out),
        _ACTIVATIONS[activation](),
    ]


def _norm_of_maps(norm: Norm, num_channels: int) -> nn.Module:
    match norm:
        case "batch":
            return nn.BatchNorm2d(num_channels)
        case "layer":
            return nn.GroupNorm(1, num_channels)
        case "none":
            return nn.Identity()


def _norm_of_features(norm: Norm, num_features: int) -> nn.Module:
    match norm:
        case "batch":
            return nn.BatchNorm1d(num_features)
        case "layer":
            return nn.LayerNorm(num_features)
        case "none":
            return nn.Identity()


def _dense(
    widths: Sequence[int], norm: Norm, activation: Activation, dropout: float, *, drop_input: bool
) -> Iterator[nn.Module]:
    for layer, (num_in, num_out) in enumerate(itertools.pairwise(widths)):
        if dropout and (layer or drop_input):
            yield nn.Dropout(dropout)
        is_output = layer == len(widths) - 2
        yield nn.Linear(num_in, num_out, bias=is_output or norm == "none")
        if not is_output:
            yield _norm_of_features(norm, num_out)
            yield _ACTIVATIONS[activation]()
