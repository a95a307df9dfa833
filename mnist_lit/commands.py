"""The commands: what each of them does with trainer, model and data."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from mnist_lit.cli import CLI
from mnist_lit.command_line import CommandLine
from mnist_lit.console import configure_logging, fit_lines, format_summary, metric_lines
from mnist_lit.errors import MNISTLitError, Stopped, describe_machine_error
from mnist_lit.inference.predict import report_predictions
from mnist_lit.training.checkpoints import LAST, read_checkpoint
from mnist_lit.training.hardware import configure_cpu
from mnist_lit.training.run_dir import is_global_zero

__all__ = ["Commands", "dry_run", "run"]


def run(command: str, command_line: CommandLine, **kwargs: Any) -> "Commands":
    """Build what a command line asks for, and run its command."""
    configure_logging()
    configure_cpu()
    commands = Commands(command, command_line, **kwargs)
    try:
        with commands.advice():
            getattr(commands, command)()
    finally:
        commands.claimed.release()
    return commands


def dry_run(command: str, command_line: CommandLine, **kwargs: Any) -> CLI:
    """Build what a command line asks for; run and write nothing."""
    configure_logging()
    return CLI(command, command_line, is_dry=True, **kwargs)


class Commands(CLI):
    """Runs the commands."""

    def fit(self) -> None:
        """Train; then test the best checkpoint, where that is wanted."""
        self._run("fit")
        metrics = dict(self.trainer.callback_metrics)
        if self.config.test_after_fit:
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", None)
            self.trainer.test(self.model, self.datamodule, ckpt_path=best or None, verbose=False)
            self.trainer.callback_metrics.update(metrics)
        self._report()

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
            self.claimed.is_new = False  # it is kept: predictions.csv is complete but for these files
            raise MNISTLitError(
                f"{num_skipped:,} of {len(self.datamodule.image_files):,} files cannot be read as images"
            )

    def export(self) -> None:
        """Write the model for other programs, and check it against this one on the test set."""
        from mnist_lit.inference.export import export_model

        export_model(self.model, self.datamodule, self._probabilities(), Path(self.config.output))

    def demo(self) -> None:
        """Serve a page on which digits can be drawn or photographs dropped."""
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
        """Add to an error how to go on with the run, or remove a run that has not begun."""
        try:
            yield
        except Stopped as stop:
            advice = self._how_to_go_on()
            if not is_global_zero():
                raise SystemExit(0) from stop  # the first process prints the message and has the exit code
            raise Stopped(stop.signum, advice) from stop
        except MNISTLitError:
            self._how_to_go_on()
            raise
        except Exception as error:
            reason = describe_machine_error(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            raise MNISTLitError(f"{reason}\n{self._how_to_go_on()}") from error

    def _how_to_go_on(self) -> str:
        """Remove a run that has not begun; name the command that goes on with one that has."""
        num_done = self.checkpoint.step if self.checkpoint is not None else 0
        if self.command != "fit" or self.trainer.global_step <= num_done:
            self.claimed.remove()
            return ""
        checkpoints = Path(getattr(self.trainer.checkpoint_callback, "dirpath", None) or self.run_dir / "checkpoints")
        if not checkpoints.parent.is_dir():
            return f"{self.run_dir} is gone, and with it what was done"
        if not (checkpoints / LAST).is_file():
            return ""
        run_dir = self.run_dir if is_global_zero() else checkpoints.parent
        return f"what was done is kept; go on with: {self.command_line.program} --ckpt_path {run_dir}"

    @rank_zero_only
    def _report(self) -> None:
        page = self._write_page()
        if self.command == "fit":
            lines = fit_lines(self.run_dir, self.trainer, page, self.command_line.program)
        else:
            lines = metric_lines(self.trainer.callback_metrics)
        print(format_summary(lines))
        print(self.run_dir)

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
