"""Plain networks: images in [0, 1] in, logits out; the normalisation of the images is part of the network."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Activation", "GlobalPool", "Network", "Norm", "Pooling"]

Activation = Literal["relu", "gelu", "silu", "leaky_relu"]
GlobalPool = Literal["none", "avg", "max"]
Norm = Literal["batch", "layer", "none"]
Pooling = Literal["max", "avg", "none"]
Layer = Callable[..., nn.Module]

_ACTIVATIONS: dict[Activation, Layer] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}
_GLOBAL_POOLS: dict[GlobalPool, Layer] = {
    "none": nn.Identity,
    "avg": nn.AdaptiveAvgPool2d,
    "max": nn.AdaptiveMaxPool2d,
}
_POOLINGS: dict[Pooling, Layer] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d, "none": nn.Identity}
_NORMS_OF_MAPS: dict[Norm, Layer] = {
    "batch": nn.BatchNorm2d,
    "layer": functools.partial(nn.GroupNorm, 1),
    "none": nn.Identity,
}
_NORMS_OF_FEATURES: dict[Norm, Layer] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}


class Network(nn.Module):
    """Compute logits by convolution stages, then dense layers; the arguments are those of `ConvNet`.

    A stage is `convs_per_stage` times convolution, normalisation and activation, with pooling to half the size after
    its first convolution or at its end. Without stages it is a multi-layer perceptron on the pixels.
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
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        if not channels and not hidden:
            raise ValueError("the network is empty: give at least one number in model.channels or in model.hidden")
        if residual and unpadded_stages and convs_per_stage > 1:
            raise ValueError("model.residual needs maps that keep their size\nuse --model.unpadded_stages 0")
        shape = (in_channels, 1, 1) if in_channels > 1 else ()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        pool_at_end = pool_at_end and convs_per_stage > 1
        layers: list[nn.Module] = []
        for stage, (num_in, num_out) in enumerate(itertools.pairwise([in_channels, *channels])):
            padding = "valid" if stage < unpadded_stages else "same"
            convolution = functools.partial(
                _convolution, kernel_size=kernel_size, padding=padding, norm=norm, activation=activation
            )
            layers += convolution(num_in, num_out, pooling="none" if pool_at_end else pooling)
            others = [part for _ in range(convs_per_stage - 1) for part in convolution(num_out, num_out)]
            layers += [Residual(*others)] if residual and others else others
            layers += [_POOLINGS[pooling](2)] if pool_at_end else []
        layers += [_GLOBAL_POOLS[global_pool](1)] if channels else []
        self.stages = nn.Sequential(*layers)
        widths = [_num_features(self.stages, in_channels, image_size), *hidden, num_classes]
        self.head = nn.Sequential(nn.Flatten(), *_dense(widths, norm, activation, dropout, drop_input=bool(channels)))

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


def _num_features(stages: nn.Module, in_channels: int, image_size: int) -> int:
    """Count the values that the stages compute from an image."""
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


def _convolution(
    num_in: int,
    num_out: int,
    *,
    kernel_size: int,
    padding: str,
    norm: Norm,
    activation: Activation,
    pooling: Pooling = "none",
) -> list[nn.Module]:
    return [
        nn.Conv2d(num_in, num_out, kernel_size, padding=padding, bias=norm == "none"),
        _POOLINGS[pooling](2),
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
