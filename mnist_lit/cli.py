"""The command line: objects from layers of configuration, and the commands that run them."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import restricted_number_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from mnist_lit.app import Request
from mnist_lit.console import configure_logging
from mnist_lit.data.datamodule import MNISTDataModule
from mnist_lit.errors import MNISTLitError, Stopped, UsageError
from mnist_lit.formatting import escape_unprintable
from mnist_lit.inference.predict import (
    format_predictions,
    predictions_for_files,
    predictions_for_test_set,
    write_predictions,
)
from mnist_lit.machine_errors import describe_machine_error
from mnist_lit.model.convnet import ConvNet
from mnist_lit.model.ensemble import Ensemble
from mnist_lit.model.networks import NUM_CLASSES
from mnist_lit.parser_errors import explain_object, explain_trainer
from mnist_lit.parsing import Parser, parse
from mnist_lit.signals import ignore_sigint, raise_on_signals
from mnist_lit.summary import fit_lines, format_summary, metric_lines
from mnist_lit.training.allocator import tune
from mnist_lit.training.callbacks import EMA, BestCheckpoint, EarlyStop, LastCheckpoint, Progress
from mnist_lit.training.checkpoints import LAST, AtomicCheckpointIO, Source
from mnist_lit.training.launcher import Companions, companions, is_loss_of_another
from mnist_lit.training.loggers import CSV, TensorBoard
from mnist_lit.training.metrics import RunRecord
from mnist_lit.training.plots import Pictures
from mnist_lit.training.precision import native_precision
from mnist_lit.training.run_dir import LOGS, Claim, claimed, is_first_process, write_text
from mnist_lit.training.trainer import DigitTrainer

if TYPE_CHECKING:
    from mnist_lit.data.image_files import Photograph

__all__ = ["CLI", "rehearse", "run"]

# Without a name jsonargparse makes one of the range.
Threads: Any = restricted_number_type(None, int, [(">=", 1), ("<=", 1024)])
GROUPS = {"checkpoint": BestCheckpoint, "early_stopping": EarlyStop, "ema": EMA, "pictures": Pictures}
TRAINER_DEFAULTS = {
    "max_epochs": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module shares the images out, and repeats none
}
# The commands that have no run: they use a model, on the CPU and in full precision, wherever it was trained.
USES = ("export", "demo")
FOR_USE = {
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "precision": "32-true",
    "logger": False,
    "profiler": None,
}


# Between the moment in which a process is missed and the one in which it is known how it ended.
SECONDS_TO_DIE = 5.0
# What LightningCLI keeps of the parser of each command: making one takes a quarter of a second, and a search runs `fit`
# many times in a process.
PARSERS: dict[str, dict[str, Any]] = {}


def run(request: Request, callbacks: Sequence[Callback] = ()) -> "CLI":
    """Carry out what was asked for."""
    configure_logging()
    tune()
    return CLI(request, callbacks)


def rehearse(request: Request) -> "CLI":
    """Build everything that was asked for, and neither run nor write anything."""
    configure_logging()
    return Rehearsal(request)


class CLI(LightningCLI):
    """One command with its trainer, model and data.

    Args:
        request: What was asked for.
        callbacks: Callbacks of the trainer beside the configured ones.
    """

    model: ConvNet
    datamodule: MNISTDataModule

    def __init__(self, request: Request, callbacks: Sequence[Callback] = ()) -> None:
        self.request = request
        self.callbacks = callbacks
        self.source: Source | None = None
        self.members: list[Source] = []
        self.run_dir = LOGS
        with ExitStack() as self.until_the_end:
            super().__init__(
                ConvNet,
                MNISTDataModule,
                trainer_class=DigitTrainer,
                save_config_callback=None,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=42,
                parser_class=Parser,
                parser_kwargs={"prog": "python -m mnist_lit"},
                auto_configure_optimizers=False,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Lightning lets an optimizer of the config know its CLI: a copy of the model would have one of all there is.
        return self

    # Configuration

    # Lightning's is static: it makes the parsers of all commands.
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        skipped = {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
        return {self.request.command: skipped | {"verbose", "weights_only", "return_predictions"}}

    def setup_parser(self, *args: Any) -> None:
        command = self.request.command
        if command not in PARSERS:
            before = set(vars(self))
            super().setup_parser(*args)
            PARSERS[command] = {name: value for name, value in vars(self).items() if name not in before}
        vars(self).update(PARSERS[command])

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
        parser.add_argument(
            "--report", type=bool, default=True, help="Whether the run is also shown on a page, RUN/report.html."
        )
        parser.add_argument(
            "--num_threads",
            type=Threads | None,
            default=None,
            help="Threads of torch on the CPU, 1 to 1024; default one for each core. The last bits depend on it.",
        )
        if self.request.command != "fit":
            parser.add_argument(
                "--ensemble",
                type=list[str],
                default=[],
                help="More checkpoints (file, URL, run directory), whose probabilities are averaged with ckpt_path's.",
            )
        parser.link_arguments("data.image_size", "model.image_size")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        command = self.request.command
        self.subcommand_parser = self._subcommand_parsers[command]
        assert isinstance(parser, Parser)
        self.config, self.source = parse(parser, self.request, self.subcommand_parser.get_defaults())
        config = self.config[command]
        self.members = [_member(path) for path in config.get("ensemble", [])]
        if self.source is None or self.source.goes_on:
            return
        if self.members or _dataset(self.source) not in (None, config.data.dataset):
            # A run's record is of its own network and data; results of others get a directory of their own.
            self.source.run_dir = None

    def _parse_ckpt_path(self) -> None:
        """Nothing is left to do: the checkpoint is the weakest of the layers, not the strongest."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.request.command]
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if self.request.command in USES:
            for name, value in FOR_USE.items():
                config.trainer[name] = value
            config.data.predict_paths = None
        if config.trainer.precision is None:
            config.trainer.precision = native_precision(config.trainer.accelerator)
        if self.source is not None and self.source.goes_on:
            config.ckpt_path = None
        self.wanted_run_dir = Path(config.run_dir) if config.run_dir else None
        config.run_dir = None  # config.yaml repeats the run in a directory of its own
        dump = self.subcommand_parser.dump(config, skip_unset=False, skip_link_targets=False)
        # Under this name Lightning finds it, too, and makes none of its own.
        self.config_dump: dict[str, Any] = yaml.safe_load(dump)
        model = {name: value for name, value in self.config_dump["model"].items() if name != "image_size"}
        self.plain_config = {**self.config_dump, "model": model}

    # Objects

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError) as error:
            raise UsageError(explain_object(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.request.command]
        self.subcommand_parser.callback_keys = [name for name in GROUPS if config[name].enabled]
        if self.source is not None:
            self.source.check_network(self.model.state_dict(), self.plain_config["model"])
            if self.members:
                self._assemble([self.source, *self.members])
        # A terminal's Ctrl-C comes to all processes of a run and is for the first of them to obey.
        self.until_the_end.enter_context(raise_on_signals() if is_first_process() else ignore_sigint())
        self.claim = self.until_the_end.enter_context(self._place(config))
        self.run_dir = self.claim.run_dir
        try:
            return self._make_trainer(config, **kwargs)
        except BaseException:
            self.claim.give_up()
            raise

    def _assemble(self, sources: Sequence[Source]) -> None:
        models = [ConvNet.load_from_checkpoint(str(source.file), map_location="cpu") for source in sources]
        for source, model in zip(sources, models, strict=True):
            if model.hparams["image_size"] != self.model.hparams["image_size"]:
                raise UsageError(f"ensemble: {source.file} is for images of another size (data.image_size)")
        # To whoever evaluates it there is no difference.
        self.model.network = Ensemble([model.network for model in models])

    def _place(self, config: Namespace) -> AbstractContextManager[Claim]:
        command = self.request.command
        if is_first_process() and command != "demo":
            tests_too = command == "fit" and config.test_after_fit
            # Where it fails, no run directory is left behind.
            self.datamodule.fetch(command, *["test"] * tests_too)
        if command in USES:
            return nullcontext(Claim(self.run_dir))
        if self.source is None:
            return claimed(self.wanted_run_dir, existing=None)
        return claimed(self.wanted_run_dir, existing=self.source.run_dir, goes_on=self.source.goes_on)

    def _make_trainer(self, config: Namespace, **kwargs: Any) -> Trainer:
        config.pictures.folder = self.run_dir / "pictures"
        self.trainer_defaults = {**TRAINER_DEFAULTS, "callbacks": self._callbacks(config)}
        kwargs["enable_checkpointing"] = config.checkpoint.enabled
        kwargs["logger"] = self._loggers(config.trainer.logger)
        try:
            trainer = super().instantiate_trainer(default_root_dir=self.run_dir, **kwargs)
        except (ValueError, TypeError, OverflowError, MisconfigurationException) as error:
            raise UsageError(explain_trainer(str(error), vars(config.trainer), self.request)) from error
        if self.request.command == "predict" and trainer.world_size > 1:
            raise UsageError("predict writes one file from one process\nadd --trainer.devices 1")
        launcher = trainer.strategy.launcher
        if launcher is not None and not hasattr(launcher, "cluster_environment"):
            raise UsageError("trainer.strategy: processes that begin as copies of this one are not started\nuse ddp")
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _callbacks(self, config: Namespace) -> list[Any]:
        if not self.datamodule.val_size:
            config.checkpoint.monitor = None
        record = RunRecord(
            self.run_dir, self.plain_config, monitor=config.checkpoint.monitor, mode=config.checkpoint.mode
        )
        callbacks: list[Any] = [record, *self.callbacks]
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
        # What a killed run wrote after its last checkpoint is written again.
        step = self.source.step if self.source is not None and self.source.goes_on else None
        loggers: list[Logger] = [TensorBoard(self.run_dir, purge_step=step)]
        if self.config[self.request.command].csv:
            loggers.append(CSV(self.run_dir, purge_step=step))
        return loggers + [logger for logger in others if isinstance(logger, Logger)]

    @rank_zero_only
    def after_instantiate_classes(self) -> None:
        command = self.request.command
        if command in USES:
            return
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
        with self._together():
            self._run("fit")
            metrics = dict(self.trainer.callback_metrics)
            if self.config.fit.test_after_fit:
                best = getattr(self.trainer.checkpoint_callback, "best_model_path", None)
                self.trainer.test(self.model, self.datamodule, ckpt_path=best or None, verbose=False)
                self.trainer.callback_metrics.update(metrics)
        self._report()

    def validate(self, model: ConvNet, datamodule: MNISTDataModule, **kwargs: Any) -> None:
        """Evaluate on the validation split."""
        with self._together():
            self._run("validate", verbose=False)
        self._report()

    def test(self, model: ConvNet, datamodule: MNISTDataModule, **kwargs: Any) -> None:
        """Evaluate on the official test set."""
        with self._together():
            self._run("test", verbose=False)
        self._report()

    def predict(self, model: ConvNet, datamodule: MNISTDataModule, **kwargs: Any) -> None:
        """Write predictions.csv; of photographs also a picture."""
        picture = self.run_dir / "pictures" / "predictions.png"
        with self._together():
            batches = self._run("predict")
        probabilities = torch.cat([torch.empty(0, NUM_CLASSES), *(batches or [])])
        picture.unlink(missing_ok=True)  # it would be of other images than the table
        if datamodule.predict_paths:
            self._report_photographs(datamodule.photographs, probabilities, picture)
        else:
            predictions = predictions_for_test_set(datamodule.dataset, probabilities)
            write_predictions(self.run_dir / "predictions.csv", predictions, probabilities.shape[1])
            print(self.run_dir)

    def _report_photographs(self, photographs: list["Photograph"], probabilities: Tensor, picture: Path) -> None:
        read = [one for one in photographs if not one.problem]
        skipped = [one for one in photographs if one.problem]
        predictions = predictions_for_files(read, probabilities)
        write_predictions(self.run_dir / "predictions.csv", predictions, probabilities.shape[1])
        if read:
            from mnist_lit.inference.prediction_grid import draw_predictions  # image libraries

            draw_predictions(picture, read, predictions)
            print(f"{format_predictions(predictions)}\nin pictures: {picture}")
        for one in skipped:
            print(f"skipped: {escape_unprintable(f'{one.file}: {one.problem}')}", file=sys.stderr)
        print(self.run_dir)
        if skipped:
            raise MNISTLitError(f"{len(skipped):,} of {len(photographs):,} files cannot be read as images")

    def export(self, model: ConvNet, datamodule: MNISTDataModule, output: str, int8: bool, **kwargs: Any) -> None:
        """Write the model for other programs."""
        with self._together():
            self._run("export", output=output, int8=int8)

    def demo(self, model: ConvNet, datamodule: MNISTDataModule, host: str, port: int, **kwargs: Any) -> None:
        """Serve the page."""
        with self._together():
            self._run("demo", host=host, port=port)

    def _run(self, command: str, **kwargs: Any) -> Any:
        # An ensemble has been loaded already.
        file = self.source.file if self.source is not None and not self.members else None
        return getattr(self.trainer, command)(self.model, self.datamodule, ckpt_path=file, **kwargs)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Run with the other processes, if there are any; what goes wrong is said in few words."""
        with companions(self.trainer, self.request.args) as others:
            try:
                yield
            except Stopped as stop:
                raise self._stopped(stop.signum) from stop
            except MNISTLitError:
                self._leave()
                raise
            except Exception as error:
                raise self._failed(error, others) from error

    def _stopped(self, signum: int) -> BaseException:
        # Of several processes the first one speaks for all.
        return Stopped(signum, self._leave()) if is_first_process() else SystemExit(0)

    def _failed(self, error: Exception, others: Companions) -> BaseException:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if self.trainer.world_size > 1 and is_loss_of_another(error):
            lost = others.loss(SECONDS_TO_DIE)
            if others.are_led:
                return SystemExit(0)  # not this process has failed
            reason = lost or f"another of the {self.trainer.world_size} processes is gone or silent: {reason}"
        return MNISTLitError(f"{describe_machine_error(error) or reason}\n{self._leave()}")

    def _leave(self) -> str:
        """Leave nothing of a run that has not begun; say how to go on with one that has."""
        num_done = self.source.step if self.source is not None else 0
        if self.request.command != "fit" or self.trainer.global_step <= num_done:
            self.claim.give_up()
            return ""
        checkpoints = Path(getattr(self.trainer.checkpoint_callback, "dirpath", None) or self.run_dir / "checkpoints")
        if not checkpoints.parent.is_dir():
            return f"{self.run_dir} is gone, and with it what was done"
        if not (checkpoints / LAST).is_file():
            return ""
        run_dir = self.run_dir if is_first_process() else checkpoints.parent
        return f"what was done is kept; go on with: python -m mnist_lit fit --ckpt_path {run_dir}"

    @rank_zero_only
    def _report(self) -> None:
        page = self._write_page()
        is_fit = self.request.command == "fit"
        metrics = self.trainer.callback_metrics
        print(format_summary(fit_lines(self.run_dir, self.trainer, page) if is_fit else metric_lines(metrics)))
        print(self.run_dir)

    def _write_page(self) -> Path | None:
        # Results of others' checkpoints lie in a directory that is no run's.
        is_run = (self.run_dir / "config.yaml").is_file()
        if not self.config[self.request.command].report or not is_run:
            return None
        from mnist_lit.reports.run_report import write_run_report  # TensorBoard

        try:
            return write_run_report(self.run_dir, self._defaults())
        except (OSError, MNISTLitError) as error:
            # What was trained or measured is there all the same.
            print(f"note: report.html is not written: {error}", file=sys.stderr)
            return None

    def _defaults(self) -> dict[str, Any]:
        defaults = self.subcommand_parser.get_defaults()
        defaults.trainer.precision = native_precision(self.config[self.request.command].trainer.accelerator)
        dump = self.subcommand_parser.dump(defaults, skip_unset=False, skip_link_targets=False)
        plain: dict[str, Any] = yaml.safe_load(dump)
        return plain


class Rehearsal(CLI):
    """A command with everything built, up to where it would begin."""

    def _place(self, config: Namespace) -> AbstractContextManager[Claim]:
        return nullcontext(Claim(self.run_dir))

    def after_instantiate_classes(self) -> None:
        """Nothing: no config.yaml is written."""

    def fit(self, model: ConvNet, datamodule: MNISTDataModule, **kwargs: Any) -> None:
        """Nothing: no command is run."""

    validate = test = predict = fit


def _member(path: str) -> Source:
    try:
        return Source(path, for_fit=False)
    except UsageError as error:
        raise UsageError(str(error).replace("ckpt_path", "ensemble", 1)) from error


def _dataset(source: Source) -> str | None:
    dataset: str | None = source.config.get("data", {}).get("dataset")
    return dataset
