"""Classify images with PyTorch Lightning, configured by files and flags."""

from typing import TYPE_CHECKING

import lazy_loader  # type: ignore[import-untyped]

from mnist_lit.app import main
from mnist_lit.version import __version__

if TYPE_CHECKING:
    from mnist_lit.data.datamodule import MNISTDataModule
    from mnist_lit.model.classifier import Classifier, ConvNet

__all__ = ["Classifier", "ConvNet", "MNISTDataModule", "__version__", "main"]

# Imported on first use: torch takes seconds, and a mistyped file name deserves its answer before that.
CLASSES = {"model.classifier": ["Classifier", "ConvNet"], "data.datamodule": ["MNISTDataModule"]}
__getattr__, *_ = lazy_loader.attach(__name__, submod_attrs=CLASSES)
