"""The commands: what each of them does with trainer, model and data."""

import json
import math
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from mnist_lit.cli import CLI
from mnist_lit.command_line import CommandLine
from mnist_lit.errors import MNISTLitError, Stopped, UsageError, describe_machine_error, format_own_frames
from mnist_lit.formatting import METRICS, format_score
from mnist_lit.inference.predict import report_predictions
from mnist_lit.parser_errors import explain_trainer
from mnist_lit.process import configure_cpu, configure_logging
from mnist_lit.training.callbacks import BestCheckpoint
from mnist_lit.training.checkpoints import LAST, read_checkpoint
from mnist_lit.training.run_dir import is_global_zero, write_text


def run(command: str, command_line: CommandLine, *, is_dry: bool = False, **kwargs: Any) -> "Commands":
    """Build what a command line asks for, and run its command unless it is a dry run."""
    configure_logging()
    configure_cpu()
    commands = Commands(command, command_line, is_dry=is_dry, **kwargs)
    if not is_dry:
        with commands.advice():
            getattr(commands, command)()
    return commands


class Commands(CLI):
    """Runs the commands."""

    def fit(self) -> None:
        """Train; then test the best checkpoint, where that is wanted."""
        self._run("fit")
        trainer, metrics = self.trainer, dict(self.trainer.callback_metrics)
        # The test resets the counters where a callback searches for the batch size.
        more, num_epochs = self._next_limit(), trainer.current_epoch
        if self.config.test_after_fit:
            best = getattr(self.checkpoint_callback, "best_model_path", "")
            best = best if Path(best).is_file() else None  # it may have been deleted before the run was resumed
            trainer.test(self.model, self.datamodule, ckpt_path=best, verbose=False)
            trainer.callback_metrics.update(metrics)
        self._report(more, num_epochs)

    @property
    def checkpoint_callback(self) -> Checkpoint | None:
        """Return the callback that keeps the best epoch; a user's own may stand before it."""
        of_run = (callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint))
        return next(of_run, self.trainer.checkpoint_callback)

    def _next_limit(self) -> tuple[str, str]:
        """Return the limit that has ended the run, and twice its value."""
        trainer: Any = self.trainer
        for timer in trainer.callbacks:
            if isinstance(timer, Timer) and (timer.time_remaining() or 0) < 0:
                days, seconds = divmod(math.ceil(2 * timer.time_elapsed()), 86400)
                return "max_time", f"{days:02}:{timedelta(seconds=seconds)!s:0>8}"
        if 0 < trainer.max_steps <= trainer.global_step:
            return "max_steps", str(2 * trainer.global_step)
        return "max_epochs", str(2 * trainer.current_epoch)

    def validate(self) -> None:
        """Evaluate on the validation split."""
        self._run("validate", verbose=False)
        self._report()

    def test(self) -> None:
        """Evaluate on the official test set."""
        self._run("test", verbose=False)
        self._report()

    def predict(self) -> None:
        """Write predictions.csv; of image files also a picture."""
        probabilities = self._probabilities()
        num_skipped = report_predictions(self.run_dir, self.datamodule, probabilities)
        print(self.run_dir)
        if num_skipped:
            self.run_dir_lock.is_new = False  # it is kept: predictions.csv is complete but for these files
            raise MNISTLitError(
                f"{num_skipped:,} of {len(self.datamodule.image_files):,} files cannot be read as images"
            )

    def export(self) -> None:
        """Write the model for other programs, and check it against this one on the test set."""
        from mnist_lit.inference.export import export_model

        export_model(self.model, self.datamodule, self._probabilities(), Path(self.config.output))

    def demo(self) -> None:
        """Serve a page that predicts the class of what is drawn or dropped on it."""
        from mnist_lit.inference.demo import serve

        if self.checkpoint is not None and self.checkpoint.file is not None and not self.ensemble:
            self.model.load_state_dict(read_checkpoint(self.checkpoint.file)["state_dict"])
        serve(self.model, self.datamodule, host=self.config.host, port=self.config.port)

    def _probabilities(self) -> Tensor:
        return torch.cat([torch.empty(0, self.model.num_classes), *(self._run("predict") or [])])

    def _run(self, function: str, **kwargs: Any) -> Any:
        # The networks of an ensemble have their weights already.
        file = self.checkpoint.file if self.checkpoint is not None and not self.ensemble else None
        return getattr(self.trainer, function)(self.model, self.datamodule, ckpt_path=file, **kwargs)

    @contextmanager
    def advice(self) -> Iterator[None]:
        """Add to an error how to go on with the run; remove a run that has not begun."""
        try:
            yield
        except BaseException as error:
            self._remove_or_advise(error)
            # Lightning checks some arguments of its Trainer when it has the loaders.
            is_early = isinstance(error, ValueError) and not (self.trainer.global_step or format_own_frames(error))
            if is_early or isinstance(error, MisconfigurationException):
                message = explain_trainer(str(error), vars(self.config.trainer), self.command_line)
                raise UsageError("\n".join([message, *getattr(error, "__notes__", [])])) from error
            if isinstance(error, Stopped) and not is_global_zero():
                raise SystemExit(0) from error  # the first process prints the message and has the exit code
            raise
        finally:
            self.run_dir_lock.release()

    def _remove_or_advise(self, error: BaseException) -> None:
        num_done = self.checkpoint.step if self.checkpoint is not None else 0
        has_begun = self.command == "fit" and self.trainer.global_step > num_done
        checkpoints = Path(getattr(self.checkpoint_callback, "dirpath", None) or self.run_dir / "checkpoints")
        is_known = isinstance(error, (MNISTLitError, Stopped)) or describe_machine_error(error)
        if not is_known and format_own_frames(error) and self.run_dir.is_dir():
            write_text(self.run_dir / "error.txt", "".join(traceback.format_exception(error)))
        elif not has_begun:
            self.run_dir_lock.remove()
        if has_begun and not checkpoints.parent.is_dir():
            error.add_note(f"{self.run_dir} was deleted with its checkpoints")
        elif has_begun and (checkpoints / LAST).is_file():
            run_dir = shlex.quote(str(self.run_dir if is_global_zero() else checkpoints.parent))
            error.add_note(f"what was done is kept; go on with: {self.command_line.program} --ckpt_path {run_dir}")

    @rank_zero_only
    def _report(self, more: tuple[str, str] = ("", ""), num_epochs: int = 0) -> None:
        if getattr(self.trainer, "fast_dev_run", False):
            self.run_dir_lock.remove()
            print("fast_dev_run: nothing is kept")
            return
        page = self._write_page()
        metrics = self.trainer.callback_metrics
        if self.command == "fit":
            lines = self._fit_lines(page, more, num_epochs)
        else:
            lines = {name: format_score(name, float(metrics[name])) for name in METRICS if name in metrics}
        width = max(map(len, lines), default=0)
        print(*(f"{name:{width}}  {value}" for name, value in lines.items()), self.run_dir, sep="\n")

    def _fit_lines(self, page: Path | None, more: tuple[str, str], num_epochs: int) -> dict[str, str]:
        """Collect results and the commands that go on from them, by the names of their lines."""
        file, run_dir = self.run_dir / "metrics.json", shlex.quote(str(self.run_dir))
        metrics = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        lines = {}
        if "val/acc" in metrics and "epoch" in metrics:
            lines["best epoch"] = f"{metrics['epoch'] + 1}" + (f" of {num_epochs}" if more[0] == "max_epochs" else "")
        lines |= {name: format_score(name, metrics[name]) for name in ("val/acc", "test/acc") if name in metrics}
        if "seconds" in metrics:
            lines["seconds"] = f"{metrics['seconds']:.1f}"
        if page is not None:
            lines["report"] = shlex.quote(str(page))
        if any(self.run_dir.glob("events.out.tfevents.*")):
            lines["look"] = f"tensorboard --logdir {run_dir}"
        if (self.run_dir / "checkpoints" / LAST).is_file():
            lines["go on"] = f"{self.command_line.program} --ckpt_path {run_dir} --trainer.{more[0]} {more[1]}"
        return lines

    def _write_page(self) -> Path | None:
        # Results of a checkpoint from elsewhere lie in a directory without a run.
        if not self.config.report or not (self.run_dir / "config.yaml").is_file():
            return None
        from mnist_lit.reports.run_report import write_run_report  # TensorBoard

        try:
            return write_run_report(self.run_dir, self.defaults())
        except (OSError, MNISTLitError) as error:
            # What was trained or measured is kept all the same.
            print(f"note: report.html is not written: {error}", file=sys.stderr)
            return None
