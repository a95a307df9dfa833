"""Export a model to a file for other programs, after a check that it predicts as the model does."""

import copy
import importlib
import io
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from mnist_lit.data.datamodule import MNISTDataModule, preprocess
from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.model.classifier import Classifier
from mnist_lit.signals import raise_if_stopped
from mnist_lit.version import __version__

TOLERANCE = 1e-4  # of a probability
PACKAGES = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}
DYNAMIC_SHAPES = {"images": {0: Dim("n", min=1)}}


class ExportModule(nn.Module):
    """Compute probabilities (n, num_classes) of uint8 images (n, c, h, w): preprocessing, the model and softmax."""

    def __init__(self, model: Classifier, image_size: int) -> None:
        super().__init__()
        # torch.export warns of weights in another memory format.
        self.model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(preprocess(images, self.image_size))
        return logits.softmax(dim=1)


def check_output(output: Path) -> None:
    """Make sure that a model can be exported to a file."""
    if output.suffix not in PACKAGES or output.is_dir():
        raise UsageError(
            f"output: {output} must be a file that ends in {' or '.join(PACKAGES)}\nfor example: --output model.onnx"
        )
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise UsageError(f"output: {output.parent} is not a folder\nmake it first, or give another --output")
    for package in PACKAGES[output.suffix]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UsageError(f"export to ONNX needs the package {package}\npip install 'mnist_lit[export]'") from error


def export_model(model: Classifier, datamodule: MNISTDataModule, probabilities: Tensor, output: Path) -> None:
    """Export a model, check the file on the test images and print a table of the check.

    Args:
        model: The model.
        datamodule: The data, with its test split in memory.
        probabilities: The model's for the test images, in full precision, of shape (n, num_classes).
        output: The file, `.onnx` or `.pt2`; it is replaced after the check.

    Raises:
        MNISTLitError: If the predictions of the file differ from the model's.
    """
    images, labels = datamodule.splits["test"].__getitems__(range(len(probabilities)))
    metadata = {
        "images": f"uint8 of shape (n, {', '.join(map(str, images.shape[1:]))}) for any n, as in the data set",
        "probabilities": f"float32 of shape (n, {probabilities.shape[1]}): column i is the probability of class i",
        "classes": json.dumps(datamodule.class_names),
        "dataset": datamodule.dataset,
        "mnist_lit": __version__,
    }
    # Beside the output, as only a rename on the same disk is atomic.
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        file = Path(folder, output.name)
        _write(ExportModule(model, datamodule.image_size).eval(), images[:2], file, metadata)
        outputs = _run(file, torch.split(images, datamodule.eval_batch_size))
        predictions = outputs.argmax(dim=1)
        same = f"{int((predictions == probabilities.argmax(dim=1)).sum()):,} of {len(images):,}"
        difference = float((outputs - probabilities).abs().max())
        if not difference <= TOLERANCE:  # nor NaN
            raise MNISTLitError(
                f"{output.name}: only {same} predictions for test images are the model's\n"
                f"probabilities differ by up to {difference:.1e}; the file is not kept\n"
                f"try the other format, or another release of torch than {torch.__version__}"
            )
        raise_if_stopped()
        file.replace(output)
    accuracy = float((predictions == labels).double().mean())
    print("file                   kB  test/acc  largest difference  same predictions")
    print(f"{output.name:16} {output.stat().st_size / 1000:8,.1f}  {accuracy:8.2%}  {difference:18.1e}  {same}")
    print(output)


def _write(module: ExportModule, example: Tensor, file: Path, metadata: dict[str, str]) -> None:
    program = torch.export.export(module, (example,), dynamic_shapes=DYNAMIC_SHAPES, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    if file.suffix == ".pt2":
        content = io.BytesIO()  # when the disk is full, torch's own writing ends the process
        torch.export.save(program, content, extra_files={"description.json": json.dumps(metadata)})
        file.write_bytes(content.getvalue())
        return
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    options: dict[str, Any] = {"dynamic_shapes": DYNAMIC_SHAPES, "output_names": ["probabilities"], "verbose": False}
    try:
        onnx_program = torch.onnx.export(program, dynamo=True, **options)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        hint = f"try --output model.pt2, or a newer torch than {torch.__version__}"
        raise MNISTLitError(f"{file.name}: this network cannot be converted to ONNX: {reason}\n{hint}") from error
    assert onnx_program is not None
    ClearMetadataAndDocStringPass()(onnx_program.model)  # the source of each node takes as much space as the weights
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(file)


def _run(file: Path, batches: tuple[Tensor, ...]) -> Tensor:
    if file.suffix == ".pt2":
        module = torch.export.load(file).module()
        with torch.inference_mode():
            return torch.cat([module(batch) for batch in batches])
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    outputs = [session.run(["probabilities"], {"images": batch.numpy()})[0] for batch in batches]
    return torch.cat(list(map(torch.from_numpy, outputs)))
