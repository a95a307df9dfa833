"""Lightning's Trainer with the commands that it lacks."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import Trainer

from mnist_lit.data.datamodule import MNISTDataModule
from mnist_lit.model.convnet import ConvNet
from mnist_lit.training.checkpoints import read_checkpoint

__all__ = ["DigitTrainer"]

# Declared Any, as mypy takes no other made type for an annotation; without a name jsonargparse makes one of the range.
Port: Any = restricted_number_type(None, int, [(">=", 1), ("<=", 65535)])


class DigitTrainer(Trainer):
    """A Trainer that also exports a model and shows it to people."""

    def export(
        self,
        model: ConvNet,
        datamodule: MNISTDataModule,
        ckpt_path: str | None = None,
        output: str = "model.onnx",
        int8: bool = False,
    ) -> None:
        """Write the model for other programs, and check it against this one on the test set.

        Args:
            model: The model.
            datamodule: Whose test images both read.
            ckpt_path: The checkpoint: a run directory, a file or a URL.
            output: The file to write, or to replace once the new one is checked: `.onnx`, or `.pt2` for
                `torch.export.load`. It takes uint8 images of shape (n, 1, 28, 28) and gives probabilities of shape
                (n, 10).
            int8: Whether a variant with weights and activations of eight bits is written beside it (`.onnx` only).

        Raises:
            UsageError: If the file cannot be written there, or a package is missing.
            MNISTLitError: If the exported model reads any image in another way.
        """
        from mnist_lit.inference.export import check_output, export_model

        check_output(Path(output), int8=int8)
        if int8:
            datamodule.fetch("fit")  # it is calibrated on training images, never on those it is checked with
        predictions = self.predict(model, datamodule, ckpt_path=ckpt_path)
        assert predictions is not None
        probabilities = torch.cat(predictions)  # type: ignore[arg-type]
        export_model(model, datamodule, probabilities, Path(output), int8=int8)

    def demo(
        self,
        model: ConvNet,
        datamodule: MNISTDataModule,
        ckpt_path: str | None = None,
        host: str = "127.0.0.1",
        port: Port = 7860,
    ) -> None:
        """Serve a page on which digits can be drawn or photographs dropped.

        Args:
            model: The model.
            datamodule: Whose image size the model has.
            ckpt_path: The checkpoint: a run directory, a file or a URL.
            host: Address to listen at; the default can be reached from this machine only.
            port: Port to listen at, 1 to 65535.

        Raises:
            UsageError: If a package is missing or the address cannot be had.
        """
        from mnist_lit.inference.demo import serve

        if ckpt_path is not None:
            model.load_state_dict(read_checkpoint(Path(ckpt_path))["state_dict"])
        serve(model, host=host, port=port)
