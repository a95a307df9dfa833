"""Exported models: their predictions in other programs, the check before they get their name, and refusals."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import onnx
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib import get_cachedir
from onnxruntime import InferenceSession
from runs import ended
from torch import Tensor

from mnist_lit import main
from mnist_lit.data.datamodule import preprocess

Predict = Callable[[Tensor], Tensor]
NAMES = ["model.onnx", "model.pt2"]
NETWORKS = {
    "residual, gelu, half precision": [
        "--model.convs_per_stage=3", "--model.residual=true", "--model.activation=gelu",
        "--trainer.precision=bf16-true",
    ],
    "mlp, smaller images": ["--model.channels=[]", "--model.hidden=[16]", "--data.image_size=20"],
    "layer, even kernel": ["--model.norm=layer", "--model.kernel_size=4", "--model.global_pool=max"],
}  # fmt: skip


def load(file: Path) -> Predict:
    """Load a file as another program does."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    session = InferenceSession(file)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def images_of(cli: Any) -> Tensor:
    images: Tensor = cli.datamodule.splits["test"].images.unsqueeze(1)
    return images


def expected(cli: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return cli.model.eval()(preprocess(images, cli.datamodule.image_size)).softmax(dim=1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def exported(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Everything that can be exported of a run: the folder, the result of `main`, and a finished process."""
    folder = tmp_path_factory.mktemp("exported")
    cli = main(["export", f"--ckpt_path={small_run}", f"--output={folder / 'model.pt2'}"])
    # Here onnxruntime would keep the number of this machine, by which it reports its use.
    variables = {"XDG_CACHE_HOME": str(folder), "MPLCONFIGDIR": get_cachedir()}
    return folder, cli, ended(folder, ["export", f"--ckpt_path={small_run}"], **variables)


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_images_is_predicted_as_by_the_model(name: str, exported: Any) -> None:
    folder, cli, _ = exported
    predict = load(folder / name)
    for num_images in (1, 7, 500):
        images = images_of(cli).repeat(2, 1, 1, 1)[-num_images:]
        torch.testing.assert_close(predict(images), expected(cli, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_becomes_onnx(network: str, fit: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    fit(*NETWORKS[network], "--trainer.max_epochs=1", "--run_dir=run")
    capsys.readouterr()
    main(["export", "--ckpt_path=run"])
    output, errors = capsys.readouterr()
    assert len(output.splitlines()) == 3
    assert output.splitlines()[1].endswith("360 of 360")
    assert errors == ""


def test_an_ensemble_with_test_time_augmentation_becomes_one_file(
    small_run: Path, tmp_path: Path, fit: Callable[..., Any]
) -> None:
    fit("--model.channels=[8]", "--seed_everything=1", "--run_dir=other")
    cli = main(["export", f"--ckpt_path={small_run}", "--ensemble=[other]", "--model.tta_distort=true"])
    images = images_of(cli)[:50]
    probabilities = load(tmp_path / "model.onnx")(images)
    torch.testing.assert_close(probabilities, expected(cli, images), atol=1e-5, rtol=0)


def test_files_describe_their_input_and_output(exported: Any) -> None:
    folder, _, _ = exported

    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    session = InferenceSession(folder / "model.onnx")
    [images], [probabilities] = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape, images.type) == ("images", ["n", 1, 28, 28], "tensor(uint8)")
    assert (probabilities.name, probabilities.shape) == ("probabilities", ["n", 10])
    extra_files = {"description.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra_files)
    for metadata in (
        {entry.key: entry.value for entry in model.metadata_props},
        json.loads(extra_files["description.json"]),
    ):
        assert metadata.keys() == {"images", "probabilities", "classes", "dataset", "mnist_lit"}
        assert metadata["dataset"] == "digits"


def test_no_folder_of_this_machine_is_in_a_file(exported: Any) -> None:
    folder, _, _ = exported
    contents = [file.read_bytes() for file in folder.glob("*.onnx")]
    with ZipFile(folder / "model.pt2") as archive:
        contents += [archive.read(name) for name in archive.namelist()]
    assert not any(b"site-packages" in content or b"mnist_lit/" in content for content in contents)


def test_console_has_a_table_and_the_file_and_nothing_else(exported: Any) -> None:
    folder, cli, (code, output, errors) = exported
    assert {file.name for file in folder.iterdir()} == set(NAMES)
    images, labels = images_of(cli), cli.datamodule.splits["test"].labels
    accuracy = float((expected(cli, images).argmax(dim=1) == labels).double().mean())
    heading, plain, path = output.splitlines()
    assert (code, errors) == (0, "")
    assert path == "model.onnx"
    assert heading.startswith("file")
    name, kilobytes, test_acc, difference, *same = plain.split()
    assert (name, test_acc, same) == ("model.onnx", f"{accuracy:.2%}", ["360", "of", "360"])
    assert float(kilobytes) == pytest.approx((folder / name).stat().st_size / 1000, abs=0.06)
    assert 0 < float(difference) < 1e-5


class WeightChange(Callback):
    """Change the weights after the model's predictions for the test images."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(self.factor)


class OperatorChange(Callback):
    """Change the network after its predictions to one with an operator that ONNX does not have."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.register_forward_hook(lambda *args: torch.special.bessel_j0(args[2]))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, WeightChange(1.001)) for name in NAMES),
        (NAMES[1], WeightChange(math.nan)),
        (NAMES[0], OperatorChange()),
    ],
)
def test_a_file_with_other_predictions_or_none_is_refused_and_the_earlier_one_stays(
    name: str, change: Callback, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("of yesterday")
    with pytest.raises(SystemExit) as stop:
        main(["export", f"--ckpt_path={small_run}", f"--output={name}"], callbacks=[change])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {name}: ")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "of yesterday"


def test_a_stopped_export_leaves_nothing(small_run: Path, tmp_path: Path) -> None:
    def stop_when_begun() -> None:
        while not any(file.stat().st_size for file in tmp_path.glob(".model.onnx.*/*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_begun, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        main(["export", f"--ckpt_path={small_run}"])

    assert stop.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["model.h5", "nowhere/model.onnx", "taken.onnx"])
def test_an_output_that_cannot_be_is_refused_at_once(
    output: str, small_run: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "taken.onnx").mkdir()
    error = fails("export", f"--ckpt_path={small_run}", f"--output={output}")
    assert error.startswith(f"error: output: {output.partition('/')[0]}")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken.onnx"]


def test_a_package_that_is_not_installed_is_named(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "mnist_lit[export]" in fails("export", f"--ckpt_path={small_run}")
    assert list(tmp_path.iterdir()) == []
