"""The command line: objects from layers of configuration, and the commands that run them."""

import csv
import io
import logging
import signal
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from mnist_lit.callbacks import EMA, BestCheckpoint, EarlyStop, LastCheckpoint, Progress
from mnist_lit.complaints import explain, explain_object, explain_trainer
from mnist_lit.data import MNISTDataModule
from mnist_lit.entry import Request
from mnist_lit.errors import MNISTLitError, Stopped, UsageError
from mnist_lit.loggers import CSV, TensorBoard
from mnist_lit.model import ConvNet
from mnist_lit.networks import NUM_CLASSES
from mnist_lit.pictures import Pictures
from mnist_lit.record import RunRecord
from mnist_lit.runs import LOGS, AtomicCheckpointIO, Source, claim, is_first_process, read_checkpoint, write_text

__all__ = ["CLI", "run"]

GROUPS = {"checkpoint": BestCheckpoint, "early_stopping": EarlyStop, "ema": EMA, "pictures": Pictures}
SHAPES = ("channels", "hidden", "kernel_size", "convs_per_stage", "pooling", "global_pool", "norm")
TRAINER_DEFAULTS = {"max_epochs": 10, "num_sanity_val_steps": 0, "enable_model_summary": False}
LOG_LEVELS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "lightning.pytorch.loggers.mlflow": logging.ERROR,  # it says that it makes the experiment it was asked for
    "mlflow.store.db.utils": logging.WARNING,  # it says that it makes its tables
}
# One message each, with the reason why nobody needs to read it.
NEEDLESS_WARNINGS = [
    "does not have many workers",  # the data is in memory
    "smaller than the logging interval",  # what is logged by epoch is logged all the same
    "Checkpoint directory .* exists and is not empty",  # a run that goes on
    "Total length of `list` across ranks is zero",  # data.val_size: 0
    "Experiment logs directory .* exists and is not empty",  # it is the run directory; nothing in it is deleted
    "PyTorch Profiler default schedule will be overridden",  # few steps are what a profile wants
    "Profiler clears events at the end of each cycle",
    "overfit but enabled train dataloader shuffling",  # it is turned off, as overfitting wants
    "`isinstance.treespec, LeafSpec.` is deprecated",  # between Lightning and torch
    "Using padding='same' with even kernel lengths",  # the copy is small
    "`torch.jit.trace",  # what TensorBoard draws the graph from
]


def run(request: Request) -> "CLI":
    """Carry out what was asked for."""
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for message in NEEDLESS_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
    return CLI(request)


class CLI(LightningCLI):
    """One command with its trainer, model and data.

    Args:
        request: What was asked for.
    """

    model: ConvNet
    datamodule: MNISTDataModule

    def __init__(self, request: Request) -> None:
        self.request = request
        self.source: Source | None = None
        self.run_dir = LOGS
        super().__init__(
            ConvNet,
            MNISTDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            parser_class=_Parser,
            parser_kwargs={"prog": "python -m mnist_lit"},
            auto_configure_optimizers=False,
        )

    # Configuration

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        ours = {"verbose", "weights_only", "return_predictions"}
        return {command: skipped | ours for command, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, callback in GROUPS.items():
            parser.add_lightning_class_args(callback, name)
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Folder of the run; default the next free logs/run_N."
        )
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Whether fit ends with a test of the best checkpoint."
        )
        parser.add_argument(
            "--csv", type=bool, default=False, help="Whether the scalars are also written to RUN/metrics.csv."
        )
        parser.link_arguments("data.image_size", "model.image_size")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        command, layers = self.request.command, self.request.layers()
        printing = [flag for flag in layers if flag.startswith("--print_config")]
        plain = [flag for flag in layers if flag not in printing]
        self.subcommand_parser = self._subcommand_parsers[command]
        try:
            if self.request.ckpt_path:
                self.source = Source(self.request.ckpt_path, for_fit=command == "fit")
                plain = [*self._checkpoint_layer(), *plain]
            config = parser.parse_args([command, *plain])
            if printing:
                parser.parse_args([command, *plain, *printing])
        except _ParserError as error:
            raise UsageError(explain(str(error), list(self._defaults().keys()), self.request)) from error
        if command != "fit" and self.source is None:
            raise UsageError(f"{command} needs a checkpoint\ngive --ckpt_path: a run directory, a file or a URL")
        self.config = config
        self._leave_run_of_other_data(config[command].data.dataset)

    def _leave_run_of_other_data(self, dataset: str) -> None:
        """A run's record is of the data that it was trained on; results on other data get a directory of their own."""
        source = self.source
        if source is not None and not source.goes_on and source.dataset not in (None, dataset):
            source.run_dir = None

    def _parse_ckpt_path(self) -> None:
        """Nothing is left to do: the checkpoint is the weakest of the layers, not the strongest."""

    def _defaults(self) -> Any:
        return self.subcommand_parser.get_defaults()

    def _checkpoint_layer(self) -> list[str]:
        assert self.source is not None
        if self.source.file is not None:
            checkpoint = read_checkpoint(self.source.file)
            config = checkpoint.get("config") or _from_hyper_parameters(checkpoint.get("hyper_parameters", {}))
        else:
            assert self.source.run_dir is not None
            config = yaml.safe_load((self.source.run_dir / "config.yaml").read_text())
        self.source.dataset = config.get("data", {}).get("dataset")
        config = _known(config, self._defaults().as_dict(), [])
        config["ckpt_path"] = None
        return [f"--config={yaml.safe_dump(config, default_flow_style=True, width=10**9)}"]

    def before_instantiate_classes(self) -> None:
        config = self.config[self.request.command]
        if config.trainer.precision is None:
            config.trainer.precision = native_precision(config.trainer.accelerator)
        if self.source is not None and self.source.goes_on:
            config.ckpt_path = None
        self.wanted_run_dir, config.run_dir = config.run_dir, None
        dump = self.subcommand_parser.dump(config, skip_unset=False)
        self.plain_config: dict[str, Any] = yaml.safe_load(dump)

    # Objects

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError) as error:
            raise UsageError(explain_object(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.request.command]
        self.subcommand_parser.callback_keys = [name for name in GROUPS if config[name].enabled]
        self._check_network()
        if is_first_process():
            tests_too = self.request.command == "fit" and config.test_after_fit
            # Where it fails, no run directory is left behind.
            self.datamodule.fetch(self.request.command, *["test"] * tests_too)
        wanted = Path(self.wanted_run_dir) if self.wanted_run_dir else LOGS
        new = [folder for folder in (wanted, *wanted.parents) if not folder.exists()]
        self.run_dir = self._claim_run_dir()
        config.pictures.folder = self.run_dir / "pictures"
        self.trainer_defaults = {**TRAINER_DEFAULTS, "callbacks": self._callbacks(config)}
        kwargs["enable_checkpointing"] = config.checkpoint.enabled
        try:
            trainer = super().instantiate_trainer(
                default_root_dir=self.run_dir, logger=self._loggers(config.trainer.logger), **kwargs
            )
        except Exception as error:
            if is_first_process():
                _remove_empty(new if self.wanted_run_dir else [self.run_dir, *new])
            if isinstance(error, ValueError | TypeError | MisconfigurationException):
                raise UsageError(explain_trainer(str(error), vars(config.trainer), self.request)) from error
            raise
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _check_network(self) -> None:
        """Before anything is written: the checkpoint is of this network."""
        if self.source is None or self.source.file is None:
            return
        checkpoint = read_checkpoint(self.source.file)
        if _shapes(checkpoint["state_dict"]) == _shapes(self.model.state_dict()):
            return
        theirs, ours = checkpoint.get("hyper_parameters", {}), self.plain_config["model"]
        names = [name for name in SHAPES if name in theirs and theirs[name] != ours.get(name)]
        differences = [f"model.{name} is {theirs[name]} in the checkpoint, {ours[name]} here" for name in names]
        raise UsageError("\n".join(["ckpt_path: the checkpoint is of another network", "; ".join(differences)]))

    def _claim_run_dir(self) -> Path:
        wanted = Path(self.wanted_run_dir) if self.wanted_run_dir else None
        existing = self.source.run_dir if self.source is not None else None
        if not is_first_process():  # only the first process of a run writes
            return wanted or existing or LOGS
        return claim(wanted, existing=existing)

    def _callbacks(self, config: Any) -> list[Any]:
        if not self.datamodule.val_size:
            config.checkpoint.monitor = None
        record = RunRecord(
            self.run_dir, self.plain_config, monitor=config.checkpoint.monitor, mode=config.checkpoint.mode
        )
        callbacks: list[Any] = [record]
        if config.checkpoint.enabled:
            last = LastCheckpoint()
            config.checkpoint.dirpath = last.dirpath = str((self.run_dir / "checkpoints").resolve())
            callbacks.append(last)
        has_bar = any(isinstance(callback, ProgressBar) for callback in config.trainer.callbacks or [])
        if config.trainer.enable_progress_bar is not False and not has_bar:
            callbacks.append(Progress())
        return callbacks

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        if configured is False:
            return False
        others = configured if isinstance(configured, list) else [configured]
        step = None
        if self.source is not None and self.source.goes_on:
            # What a killed run wrote after its last checkpoint is written again.
            step = read_checkpoint(self.source.file)["global_step"] if self.source.file is not None else 0
        loggers: list[Logger] = [TensorBoard(self.run_dir, purge_step=step)]
        if self.config[self.request.command].csv:
            loggers.append(CSV(self.run_dir, purge_step=step))
        return loggers + [logger for logger in others if isinstance(logger, Logger)]

    @rank_zero_only
    def after_instantiate_classes(self) -> None:
        command = self.request.command
        name = "config.yaml" if command == "fit" else f"config.{command}.yaml"
        write_text(self.run_dir / name, yaml.safe_dump(self.plain_config, sort_keys=False))
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        device = self.trainer.strategy.root_device.type
        print(
            f"{command}: {self.datamodule.dataset}, {num_parameters:,} parameters, "
            f"{device}, {self.trainer.precision}, in {self.run_dir}"
        )

    # Commands

    def fit(self, model: ConvNet, datamodule: MNISTDataModule, **kwargs: Any) -> None:
        """Train; then test the best checkpoint, where that is wanted."""
        self._run("fit")
        metrics = dict(self.trainer.callback_metrics)
        if self.config.fit.test_after_fit:
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", None)
            self.trainer.test(self.model, self.datamodule, ckpt_path=best or None, verbose=False)
            self.trainer.callback_metrics.update(metrics)
        self._report()

    def validate(self, model: ConvNet, datamodule: MNISTDataModule, **kwargs: Any) -> None:
        """Evaluate on the validation split."""
        self._run("validate", verbose=False)
        self._report()

    def test(self, model: ConvNet, datamodule: MNISTDataModule, **kwargs: Any) -> None:
        """Evaluate on the official test set."""
        self._run("test", verbose=False)
        self._report()

    def predict(self, model: ConvNet, datamodule: MNISTDataModule, **kwargs: Any) -> None:
        """Write predictions.csv."""
        if self.trainer.world_size > 1:
            raise UsageError("predict writes one file from one process\nadd --trainer.devices 1")
        batches = self._run("predict")
        _write_predictions(self.run_dir / "predictions.csv", torch.cat(batches), self.datamodule.dataset)
        print(self.run_dir)

    def _run(self, command: str, **kwargs: Any) -> Any:
        file = self.source.file if self.source is not None else None
        try:
            return getattr(self.trainer, command)(self.model, self.datamodule, ckpt_path=file, **kwargs)
        except Stopped as stop:
            raise Stopped(stop.signum, self._how_to_go_on()) from stop
        except SystemExit as stop:
            # Where it is not between two batches, Lightning answers Ctrl-C with exit code 1 and stays deaf to it.
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise Stopped(signal.SIGINT, self._how_to_go_on()) from stop
        except MNISTLitError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:500]
            raise MNISTLitError(f"{type(error).__name__}: {reason}\n{self._how_to_go_on()}") from error

    def _how_to_go_on(self) -> str:
        if self.request.command != "fit":
            return ""
        return f"what was done is kept; go on with: python -m mnist_lit fit --ckpt_path {self.run_dir}"

    @rank_zero_only
    def _report(self) -> None:
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        for name in ("val/acc", "val/acc_best", "test/acc"):
            if name in metrics:
                print(f"{name} {metrics[name]:.2%}")
        print(self.run_dir)


class _ParserError(Exception):
    """What the parser complains about, in its own words."""


class _Parser(LightningArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _ParserError(message) from ex


def native_precision(accelerator: str) -> str:
    """The fastest precision that the hardware has: bf16 where it computes in it, else what Lightning defaults to."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    capabilities: dict[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # older releases of torch cannot tell
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16-mixed" if has_bf16 else "32-true"


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _from_hyper_parameters(model: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a checkpoint stands for which was made without the command line."""
    names = [name for name in model if name not in ("image_size", "_instantiator")]
    data = {"image_size": model["image_size"]} if "image_size" in model else {}
    return {"model": {name: model[name] for name in names}, "data": data}


def _known(config: dict[str, Any], defaults: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The part of a checkpoint's configuration that this version still has; says what it leaves out."""
    known = {}
    for name, value in config.items():
        if name not in defaults:
            warnings.warn(
                f"the checkpoint's {'.'.join([*path, name])} is no option any more and is left out", stacklevel=2
            )
        elif isinstance(value, dict) and isinstance(defaults[name], dict):
            known[name] = _known(value, defaults[name], [*path, name])
        else:
            known[name] = value
    return known


@rank_zero_only
def _write_predictions(file: Path, probabilities: torch.Tensor, dataset: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "confidence", *(f"p{label}" for label in range(NUM_CLASSES))])
    for index, row in enumerate(probabilities.cpu()):
        confidence, label = row.max(dim=0)
        shares = [f"{share:.6f}" for share in row.tolist()]
        writer.writerow([f"{dataset}/test/{index}", int(label), f"{float(confidence):.6f}", *shares])
    write_text(file, text.getvalue())
