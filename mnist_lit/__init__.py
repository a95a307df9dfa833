"""A config-first PyTorch Lightning application that reads handwritten digits."""

from typing import TYPE_CHECKING

from mnist_lit.app import main

if TYPE_CHECKING:
    from mnist_lit.data.datamodule import MNISTDataModule
    from mnist_lit.model.classifier import ConvNet

__all__ = ["ConvNet", "MNISTDataModule", "main"]


def __getattr__(name: str) -> object:
    # Imported on first use: torch takes seconds, and a mistyped file name deserves its answer before that.
    if name == "ConvNet":
        from mnist_lit.model.classifier import ConvNet

        return ConvNet
    if name == "MNISTDataModule":
        from mnist_lit.data.datamodule import MNISTDataModule

        return MNISTDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
