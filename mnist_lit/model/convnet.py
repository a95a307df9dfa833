"""The classifier whose network is described by numbers: convolution stages, dense layers, or both."""

from typing import Any

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from mnist_lit.model.classifier import Classifier
from mnist_lit.model.networks import Activation, GlobalPool, Network, Norm, Pooling

__all__ = ["ConvNet"]


class ConvNet(Classifier):
    """Classify digits with a convolutional network or, without convolutions, a multi-layer perceptron.

    Args:
        channels: Output channels of each convolution stage; their number is the number of stages (may be empty).
        hidden: Units of each dense layer between the last stage and the output (may be empty).
        kernel_size: Side of the convolution kernels, in pixels.
        convs_per_stage: Convolutions in each stage.
        residual: Whether a stage adds the output of its first convolution to the output of the others.
        pooling: Operation that halves the map in each stage.
        pool_at_end: Whether that is done at the end of a stage instead of after its first convolution: more accurate,
            and less than half as fast.
        unpadded_stages: Stages, 0 or more, from the first, whose kernels stay inside the map: each convolution takes
            kernel_size - 1 pixels from its sides, so that the next ones have less to do.
        global_pool: Operation that reduces the last map to one value per channel; `none` keeps all its pixels.
        norm: Normalisation after each convolution and each hidden dense layer.
        activation: Non-linearity after each normalisation.
        dropout: Probability, 0 to 1, with which a feature is dropped before each dense layer (never a pixel).
        image_size: Side of the square input images, in pixels; the command line takes it from `data.image_size`.
        in_channels: Channels of the images; the command line takes it from `data.in_channels`.
        num_classes: Number of classes, 1 or more.
        kwargs: As those of `Classifier`.

    Raises:
        ValueError: If no network has this shape; the message says why.
    """

    def __init__(
        self,
        channels: list[PositiveInt] = [16, 32, 64],
        hidden: list[PositiveInt] = [],
        kernel_size: PositiveInt = 3,
        convs_per_stage: PositiveInt = 1,
        residual: bool = False,
        pooling: Pooling = "max",
        pool_at_end: bool = False,
        unpadded_stages: NonNegativeInt = 0,
        global_pool: GlobalPool = "none",
        norm: Norm = "batch",
        activation: Activation = "relu",
        dropout: ClosedUnitInterval = 0.0,
        image_size: PositiveInt = 28,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        **kwargs: Any,
    ) -> None:
        network = Network(
            channels=channels,
            hidden=hidden,
            kernel_size=kernel_size,
            convs_per_stage=convs_per_stage,
            residual=residual,
            pooling=pooling,
            pool_at_end=pool_at_end,
            unpadded_stages=unpadded_stages,
            global_pool=global_pool,
            norm=norm,
            activation=activation,
            dropout=dropout,
            image_size=image_size,
            in_channels=in_channels,
            num_classes=num_classes,
        )
        super().__init__(network, num_classes=num_classes, **kwargs)
