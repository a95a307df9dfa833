"""The LightningCLI: objects from layers of configuration, and the commands that run them."""

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from mnist_lit.command_line import DATA_DIR_VARIABLE, PARSER_KWARGS, CommandLine
from mnist_lit.data.datamodule import MNISTDataModule
from mnist_lit.data.folder import find_classes
from mnist_lit.errors import UsageError, format_own_frames
from mnist_lit.model.classifier import Classifier, ConvNet
from mnist_lit.model.ensemble import load_ensemble
from mnist_lit.parser_errors import explain_object, explain_trainer
from mnist_lit.parsing import add_command_arguments, parse
from mnist_lit.process import native_precision
from mnist_lit.training.callbacks import EMA, BestCheckpoint, EarlyStop, LastCheckpoint
from mnist_lit.training.checkpoints import (
    BEST,
    LINKED,
    AtomicCheckpointIO,
    ResolvedCheckpoint,
    check_network,
    find_checkpoint,
    load_weights,
)
from mnist_lit.training.metrics import MetricsWriter, TensorBoard
from mnist_lit.training.plots import Pictures
from mnist_lit.training.run_dir import LOGS, RunDir, is_global_zero, write_yaml

CALLBACKS = {"checkpoint": BestCheckpoint, "early_stopping": EarlyStop, "ema": EMA, "pictures": Pictures}
TRAINER_DEFAULTS = {
    "max_epochs": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module distributes the images, and repeats none
}
# These commands use a model on the CPU and in full precision, wherever it was trained, and have no run directory.
WITHOUT_RUN = ("export", "demo")
TRAINER_WITHOUT_RUN = {
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "precision": "32-true",
    "logger": False,
    "profiler": None,
}
CLASSIFIER_KEYS = frozenset(inspect.signature(Classifier).parameters)  # keys of a model that are not of its network
# Making a parser takes a quarter of a second, and a search runs `fit` many times in a process.
PARSERS: dict[Any, LightningArgumentParser] = {}


class CLI(LightningCLI):
    """Builds trainer, model and data of one command; its arguments are those of `main`."""

    model: Classifier
    datamodule: MNISTDataModule

    def __init__(
        self,
        command: str,
        command_line: CommandLine,
        *,
        model_class: type[Classifier] | None = None,
        datamodule_class: type[MNISTDataModule] | None = None,
        callbacks: Sequence[Callback] = (),
        is_dry: bool = False,
    ) -> None:
        self.command, self.command_line, self.callbacks, self.is_dry = command, command_line, callbacks, is_dry
        self.checkpoint: ResolvedCheckpoint | None = None
        self.initial: ResolvedCheckpoint | None = None  # whose weights a new run starts from
        self.resumes = False  # `fit` continues a run in its own directory
        self.ensemble: list[ResolvedCheckpoint] = []
        self.run_dir, self.run_dir_lock = LOGS, RunDir(LOGS)
        parser_kwargs = {"exit_on_error": False, "allow_abbrev": False, **PARSER_KWARGS[command]}
        try:
            super().__init__(
                model_class or ConvNet,
                datamodule_class or MNISTDataModule,
                run=False,
                args=[],
                save_config_callback=None,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=42,
                parser_kwargs={"prog": command_line.program, **parser_kwargs},
                auto_configure_optimizers=False,
            )
        except BaseException:
            self.run_dir_lock.remove()
            self.run_dir_lock.release()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # An optimizer that the parser makes holds its CLI, and callbacks copy the model with its optimizer.
        return self

    def setup_parser(self, *args: Any) -> None:
        key = (self.command, self.model_class, self.datamodule_class)
        if key not in PARSERS:
            super().setup_parser(*args)
            PARSERS[key] = self.parser
        self.parser = PARSERS[key]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, name)
        add_command_arguments(parser, self.command)
        keys = parser.get_defaults()  # those of `**kwargs`, too
        for name in LINKED:
            if f"data.{name}" in keys and f"model.{name}" in keys:
                parser.link_arguments(f"data.{name}", f"model.{name}")
        if "model.num_classes" in keys:
            parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        is_fit = self.command == "fit"
        base = None  # the configuration below all that was typed: a checkpoint's, or that of its network alone
        if (path := self.command_line.value_of("ckpt_path")) is not None:
            self.checkpoint = find_checkpoint(path, for_fit=is_fit)
            base = self.checkpoint.config
            wanted = self.command_line.value_of("run_dir") or path
            is_same = Path(wanted).expanduser().resolve() == Path(path).expanduser().resolve()
            self.resumes = is_fit and is_same and Path(path).expanduser().is_dir()
        elif is_fit and (path := self.command_line.value_of("init_from")) is not None:
            self.initial = find_checkpoint(path, key="init_from")
            model, data = self.initial.config.get("model", {}), self.initial.config.get("data", {})
            base = {"model": {key: model[key] for key in model if key not in CLASSIFIER_KEYS}}
            base["data"] = {key: data[key] for key in LINKED if key in data}
        is_folder = self.checkpoint is not None and self.checkpoint.dataset == "folder"
        if is_folder or "data.data_dir" not in parser.get_defaults():
            # Downloaded data sets lie there; the images of a folder lie where the run has found them.
            variables = self.command_line.environment.items()
            self.command_line.environment = {key: found for key, found in variables if found.name != DATA_DIR_VARIABLE}
        self.config = parse(parser, self.command_line, base)
        if not is_fit and self.checkpoint is None:
            raise UsageError(f"{self.command} needs a checkpoint\ngive --ckpt_path: a run directory, a file or a URL")
        self.ensemble = [find_checkpoint(member, key="ensemble") for member in self.config.get("ensemble", [])]

    def before_instantiate_classes(self) -> None:
        config = self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if self.command in WITHOUT_RUN:
            for name, value in TRAINER_WITHOUT_RUN.items():
                config.trainer[name] = value
            config.data.pop("predict_paths", None)
        if config.trainer.enable_checkpointing is False:
            config.checkpoint.enabled = False
        if self.command == "export":
            from mnist_lit.inference.export import check_output

            check_output(Path(config.output))
        if config.data.get("dataset") == "folder" and not config.data.class_names:
            # Recorded, as a later command may have a checkpoint and no images.
            config.data.class_names = list(find_classes(Path(config.data.data_dir or "data")))
        if config.trainer.precision is None and "Precision" not in str(config.trainer.plugins):
            config.trainer.precision = native_precision(config.trainer.accelerator)
        self.wanted_run_dir = Path(config.run_dir) if config.run_dir else None
        if self.resumes:
            config.ckpt_path = None
        elif self.command == "fit" and self.checkpoint is not None and self.checkpoint.run_dir is not None:
            config.ckpt_path = self.checkpoint.file and str(self.checkpoint.file)  # the run's last one may change
            config.init_from = None
        config.run_dir = None  # config.yaml repeats the run in a directory of its own
        # Lightning looks for `config_dump`, too, and would make one of its own.
        self.config_dump = self._plain(config)
        model = {name: value for name, value in self.config_dump["model"].items() if name not in LINKED}
        self.plain_config = {**self.config_dump, "model": model}

    def _plain(self, config: Namespace) -> dict[str, Any]:
        # As JSON, which is ten times as fast as YAML; it was checked when it was parsed.
        options = {"skip_unset": False, "skip_link_targets": False, "skip_validation": True}
        return dict(json.loads(self.parser.dump(config, format="json", **options)))

    def defaults(self) -> dict[str, Any]:
        """Return the defaults of all keys as plain data."""
        defaults = self.parser.get_defaults()
        defaults.trainer.precision = native_precision(self.config.trainer.accelerator)
        # A run's page, which other commands write, too, compares with the keys of `fit`.
        return {"init_from": None, **self._plain(defaults)}

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError) as error:
            if not isinstance(error, ValueError) and format_own_frames(error):
                raise  # a mistake in code, which its traceback shows
            message = str(error)  # of the parser, or of a constructor, which may end with advice
            raise UsageError(explain_object(message) if "Given value" in message else message) from error

    def _use_checkpoint(self, checkpoint: ResolvedCheckpoint, arguments: dict[str, Any]) -> None:
        """Refuse the checkpoint of another network or run, and load an ensemble."""
        dataset = self.datamodule.dataset
        if self.command == "fit" and checkpoint.file and checkpoint.dataset not in (None, dataset):
            raise UsageError(
                f"ckpt_path: that run is of data.dataset {checkpoint.dataset}, not of {dataset}\n"
                f"start a new one from its weights: --init_from {self.command_line.value_of('ckpt_path')}"
            )
        check_network(checkpoint, self.model.state_dict(), arguments)
        if self.ensemble:
            files = [str(member.file) for member in (checkpoint, *self.ensemble)]
            self.model.network = load_ensemble(self.model, files)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        arguments = {key: value for key, value in self.plain_config["model"].items() if key not in CLASSIFIER_KEYS}
        if self.checkpoint is not None:
            self._use_checkpoint(self.checkpoint, arguments)
        if self.initial is not None:
            load_weights(self.initial, self.model, arguments, self.model.num_classes)
        if not self.is_dry:
            self.run_dir_lock = self._lock_run_dir()
            self.run_dir = self.run_dir_lock.path
        config = self.config_init
        self.parser.callback_keys = [name for name in CALLBACKS if config[name].enabled]
        self.trainer_defaults = {**TRAINER_DEFAULTS, "callbacks": self._callbacks(config)}
        kwargs |= {"enable_checkpointing": config.checkpoint.enabled, "logger": self._loggers(config.trainer.logger)}
        try:
            trainer = super().instantiate_trainer(default_root_dir=self.run_dir.resolve(), **kwargs)
        except (ValueError, TypeError, OverflowError, MisconfigurationException) as error:
            raise UsageError(explain_trainer(str(error), vars(config.trainer), self.command_line)) from error
        if self.command == "predict" and trainer.world_size > 1:
            raise UsageError("predict writes one file from one process\nadd --trainer.devices 1")
        launcher = trainer.strategy.launcher
        if launcher is not None and not hasattr(launcher, "cluster_environment"):
            raise UsageError("trainer.strategy: those that fork or spawn processes are not supported\nuse ddp")
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _lock_run_dir(self) -> RunDir:
        """Fetch the data, then find or make the run directory of this command, locked if it is trained in."""
        if is_global_zero() and self.command != "demo":
            # Before there is a run directory: where it fails, none is left.
            tests_too = self.command == "fit" and self.config.test_after_fit
            self.datamodule.fetch(self.command, *["test"] * tests_too)
        existing, wanted = self.checkpoint.run_dir if self.checkpoint else None, self.wanted_run_dir
        if not self.resumes and (self.command == "fit" or self.ensemble or not self._is_of_run()):
            existing = None
        if self.command in WITHOUT_RUN or not is_global_zero():
            return RunDir(wanted or existing or LOGS)
        if existing is None or (wanted is not None and wanted.resolve() != existing.resolve()):
            return RunDir.make(wanted)
        run_dir = RunDir(existing)
        if self.resumes:
            run_dir.acquire()
        return run_dir

    def _is_of_run(self) -> bool:
        """Check whether results are those that a run directory holds: of its best checkpoint, on its own data."""
        assert self.checkpoint is not None
        file, is_partial = self.checkpoint.file, self.config.trainer.fast_dev_run
        is_best = file is None or file.name == BEST or not file.with_name(BEST).is_file()
        return is_best and not is_partial and self.checkpoint.evaluates_like(self.plain_config)

    def _callbacks(self, config: Namespace) -> list[Any]:
        if not self.datamodule.val_size:
            config.checkpoint.monitor = None
        writer = MetricsWriter(self.run_dir, self.plain_config, self.defaults, resumes=self.resumes)
        callbacks: list[Any] = [writer, *self.callbacks]
        if config.checkpoint.enabled:
            config.checkpoint.dirpath = str((self.run_dir / "checkpoints").resolve())
            callbacks.append(LastCheckpoint())
        given = config.trainer.callbacks
        has_bar = any(isinstance(callback, ProgressBar) for callback in (given if isinstance(given, list) else [given]))
        if config.trainer.enable_progress_bar is not False and not has_bar:
            callbacks.append(TQDMProgressBar(refresh_rate=20 if sys.stdout.isatty() else 0))
        return callbacks

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        if configured is False:
            return False
        others = configured if isinstance(configured, list) else [configured]
        # What a killed run wrote after its last checkpoint is written again.
        step = self.checkpoint.step if self.checkpoint is not None and self.resumes else None
        board = TensorBoard(self.run_dir, purge_step=step, csv=self.config.csv)
        return [board, *(logger for logger in others if isinstance(logger, Logger))]

    @rank_zero_only
    def after_instantiate_classes(self) -> None:
        if self.is_dry or self.command in WITHOUT_RUN:
            return
        if not self.resumes:
            name = "config.yaml" if self.command == "fit" else f"config.{self.command}.yaml"
            write_yaml(self.run_dir / name, self.plain_config)
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        hardware = f"{self.trainer.strategy.root_device.type}, {self.trainer.precision}"
        network = f"{self.datamodule.dataset}, {num_parameters:,} parameters"
        print(f"{self.command}: {network}, {hardware}, in {self.run_dir}")
