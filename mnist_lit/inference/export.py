"""A model as a file for other programs, which gets its name once it reads all test images as the model does."""

import copy
import importlib
import io
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from mnist_lit.data.datamodule import MNISTDataModule, preprocess
from mnist_lit.data.datasets import load
from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.model.convnet import ConvNet
from mnist_lit.signals import raise_if_stopped

__all__ = ["check_output", "export_model"]

TOLERANCE = 1e-4  # of a probability
BATCH_SIZE = 500
NUM_CALIBRATION = 500
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DYNAMIC_SHAPES = {"images": {0: Dim("n", min=1)}}
DESCRIPTION = {
    "images": "uint8 of shape (n, 1, 28, 28) for any n: digits bright on black (0), as in MNIST",
    "probabilities": "float32 of shape (n, 10): column i is the probability of the label i",
}


class Reader(nn.Module):
    """A model with all that comes before and after it.

    Args:
        model: The model; it is copied.
        image_size: Side of the square images that it takes, in pixels.
    """

    def __init__(self, model: ConvNet, image_size: int) -> None:
        super().__init__()
        # Of weights in another memory format torch.export warns.
        self.model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        """Images, uint8 of shape (n, 1, 28, 28), to probabilities of shape (n, 10)."""
        logits: Tensor = self.model(preprocess(images, self.image_size))
        return logits.softmax(dim=1)


class Reading(NamedTuple):
    """What a file makes of the test images, beside what the model makes of them."""

    file: Path
    kilobytes: float
    accuracy: float
    num_alike: int
    difference: float


def check_output(output: Path, *, int8: bool) -> None:
    """Make sure, before anything is computed for it, that a model can be written to a file.

    Args:
        output: The file.
        int8: Whether a variant of eight bits is wanted, too.

    Raises:
        UsageError: If it cannot, with what to do.
    """
    if output.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"output: {str(output)!r} ends in neither .onnx nor .pt2\nfor example: --output model.onnx")
    if int8 and output.suffix == ".pt2":
        raise UsageError(f"int8: of {output} there is no variant of eight bits\nfor example: --output model.onnx")
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise UsageError(f"output: {output.parent} is no folder to write to\nmake it first, or give another --output")
    for file in [output, _int8_file(output)] if int8 else [output]:
        if file.is_dir():
            raise UsageError(f"output: {file} is a folder\ngive a file, for example: --output {file / 'model.onnx'}")
    if output.suffix == ".onnx":
        _check_packages()


def export_model(
    model: ConvNet, datamodule: MNISTDataModule, probabilities: Tensor, output: Path, *, int8: bool
) -> None:
    """Write a model to a file for other programs, and say how that file reads the test images.

    Args:
        model: The model.
        datamodule: Which has its test split in memory, and for `int8` the files of its training split.
        probabilities: What the model makes of the test images in full precision, of shape (n, 10).
        output: The file, `.onnx` or `.pt2`; it is replaced once the new one is checked.
        int8: Whether a variant of eight bits is written beside it (`.onnx` only).

    Raises:
        MNISTLitError: If the file reads any image in another way than the model.
    """
    images, labels = datamodule.splits["test"].__getitems__(range(len(probabilities)))
    # Beside the output, as a file gets its name at once only where it stays on the same disk.
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        file = Path(folder) / output.name
        description = {**DESCRIPTION, "dataset": datamodule.dataset, "mnist_lit": version("mnist_lit")}
        _write(Reader(model, datamodule.image_size).eval(), file, description)
        readings = [_reading(file, images, labels, probabilities)]
        _refuse_another(readings[0], len(images))
        if int8:
            # Never from the images that it is judged by.
            training_images, _ = load(datamodule.dataset, datamodule.data_dir, "train")
            _write_int8(file, _int8_file(file), training_images[:NUM_CALIBRATION].unsqueeze(1))
            readings.append(_reading(_int8_file(file), images, labels, probabilities))
        raise_if_stopped()
        for reading in reversed(readings):
            reading.file.replace(output.with_name(reading.file.name))
    _report(readings, len(images))
    print(output)


def _check_packages() -> None:
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UsageError(f"export to ONNX needs the package {package}\npip install 'mnist_lit[export]'") from error


def _int8_file(file: Path) -> Path:
    return file.with_suffix(".int8.onnx")


# ---- Writing


def _write(reader: Reader, file: Path, description: dict[str, str]) -> None:
    example = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    program = torch.export.export(reader, (example,), dynamic_shapes=DYNAMIC_SHAPES, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    if file.suffix == ".onnx":
        _write_onnx(program, file, description)
    else:
        content = io.BytesIO()  # when the disk is full, torch's own writing ends the process
        torch.export.save(program, content, extra_files={"description.json": json.dumps(description)})
        file.write_bytes(content.getvalue())


def _write_onnx(program: torch.export.ExportedProgram, file: Path, description: dict[str, str]) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    onnx_program = torch.onnx.export(
        program, dynamo=True, dynamic_shapes=DYNAMIC_SHAPES, output_names=["probabilities"], verbose=False
    )
    assert onnx_program is not None
    ClearMetadataAndDocStringPass()(onnx_program.model)  # where each node comes from: as long as the weights
    onnx_program.model.metadata_props.update(description)
    onnx_program.save(file)


def _write_int8(file: Path, int8_file: Path, images: Tensor) -> None:
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = file.with_suffix(".prepared.onnx")
    # Optimised, what is used for every shift of an image would be there many times.
    quant_pre_process(file, prepared, skip_optimization=True, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        int8_file,
        Calibration(images),
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,  # without VNNI, x86 processors overflow where weights use all eight bits
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},  # logits are not rounded
    )


class Calibration:
    """Images by which onnxruntime finds the range of each activation; it asks for one batch after another.

    Args:
        images: uint8, shape (n, 1, 28, 28).
    """

    def __init__(self, images: Tensor) -> None:
        self.batches = iter(torch.split(images, 100))

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """The input of the network, or None at the end."""
        return next(({"images": batch.numpy()} for batch in self.batches), None)


# ---- Checking


def _reading(file: Path, images: Tensor, labels: Tensor, expected: Tensor) -> Reading:
    read = _read_onnx if file.suffix == ".onnx" else _read_pt2
    probabilities = read(file, torch.split(images, BATCH_SIZE))
    predictions = probabilities.argmax(dim=1)
    return Reading(
        file=file,
        kilobytes=file.stat().st_size / 1000,
        accuracy=float((predictions == labels).double().mean()),
        num_alike=int((predictions == expected.argmax(dim=1)).sum()),
        difference=float((probabilities - expected).abs().max()),
    )


def _read_onnx(file: Path, batches: Sequence[Tensor]) -> Tensor:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    read = [session.run(["probabilities"], {"images": batch.numpy()})[0] for batch in batches]
    return torch.from_numpy(np.concatenate(read))


def _read_pt2(file: Path, batches: Sequence[Tensor]) -> Tensor:
    module = torch.export.load(file).module()
    with torch.inference_mode():
        return torch.cat([module(batch) for batch in batches])


def _refuse_another(reading: Reading, num_images: int) -> None:
    if reading.num_alike == num_images and reading.difference <= TOLERANCE:
        return
    raise MNISTLitError(
        f"{reading.file.name} reads {num_images - reading.num_alike:,} of {num_images:,} test images in another way "
        f"than the model\nprobabilities differ by up to {reading.difference:.1e}; the file is not kept\n"
        f"try the other format, or another release of torch than {torch.__version__}"
    )


def _report(readings: list[Reading], num_images: int) -> None:
    width = max(len(reading.file.name) for reading in readings)
    print(f"{'file':{width}}       kB  test/acc  largest difference  read alike")
    for file, kilobytes, accuracy, num_alike, difference in readings:
        alike = f"{num_alike:,} of {num_images:,}"
        print(f"{file.name:{width}}  {kilobytes:7,.1f}  {accuracy:8.2%}  {difference:18.1e}  {alike}")
