"""Classify images with PyTorch Lightning, configured by files and flags."""

import importlib
from typing import TYPE_CHECKING

from mnist_lit.app import main
from mnist_lit.version import __version__

if TYPE_CHECKING:
    from mnist_lit.data.datamodule import MNISTDataModule
    from mnist_lit.model.classifier import Classifier, ConvNet

__all__ = ["Classifier", "ConvNet", "MNISTDataModule", "__version__", "main"]

MODULES = {
    "Classifier": "mnist_lit.model.classifier",
    "ConvNet": "mnist_lit.model.classifier",
    "MNISTDataModule": "mnist_lit.data.datamodule",
}


def __getattr__(name: str) -> object:
    # Imported on first use: torch takes seconds, and a mistyped file name deserves its answer before that.
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
