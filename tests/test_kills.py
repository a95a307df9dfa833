"""Processes that are killed, stopped or started at any moment: nothing is lost, mixed or half-written."""

import csv
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CHANCE, SMALL
from runs import CHILDREN, assert_as_whole, child, files, read, resume, saved
from test_datasets import FILES, Mirror, fetch, mirror, zipped

from mnist_lit import main

__all__ = ["mirror", "zipped"]

NUM_KILLS = 30
LONG = [*SMALL, *CHANCE, "--trainer.max_epochs=200"]
TEMPORARY = "checkpoints/.*.part"


def assert_sound(run_dir: Path) -> None:
    """Each file that has its final name is whole."""
    for checkpoint in run_dir.glob("checkpoints/*.ckpt"):
        assert torch.load(checkpoint, weights_only=True)["state_dict"]
    for record in run_dir.glob("*.json"):
        assert json.loads(record.read_text())
    for config in run_dir.glob("*.yaml"):
        assert yaml.safe_load(config.read_text())["model"]
    for table in run_dir.glob("*.csv"):
        *lines, _ = table.read_text().split("\n")
        assert all(len(row) == len(lines[0].split(",")) for row in csv.reader(lines))


def wait_for_a_checkpoint(run_dir: Path, process: Any) -> None:
    earlier = saved(run_dir)
    while saved(run_dir) == earlier:
        assert process.is_alive()


def wait_for_a_checkpoint_being_written(run_dir: Path, process: Any) -> None:
    earlier = set(run_dir.glob(TEMPORARY))
    while not set(run_dir.glob(TEMPORARY)) - earlier:
        assert process.is_alive()


@pytest.mark.slow
def test_run_that_is_killed_at_thirty_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    main(["fit", *LONG, f"--run_dir={whole}"])
    moments = random.Random(1)
    half_written = 0
    for number in range(NUM_KILLS):
        goes_on = (run_dir / "config.yaml").exists()
        process = child("fit", *([f"--ckpt_path={run_dir}"] if goes_on else [*LONG, f"--run_dir={run_dir}"]))
        if number % 3 == 0:
            time.sleep(moments.uniform(0, 1))
        elif number % 3 == 1:
            wait_for_a_checkpoint(run_dir, process)
            time.sleep(moments.uniform(0, 0.2))
        else:
            wait_for_a_checkpoint_being_written(run_dir, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_sound(run_dir)
        half_written += any(run_dir.glob(TEMPORARY))
    assert half_written > 2
    assert read(run_dir)["global_step"] < read(whole)["global_step"]

    resume(run_dir)

    assert_as_whole(run_dir, whole)
    assert files(run_dir) == files(whole)


# Started together


def test_of_runs_that_want_the_same_directory_one_gets_it(tmp_path: Path) -> None:
    processes = [child("fit", *SMALL, "--run_dir=run") for _ in range(4)]
    for process in processes:
        process.join(300)
    assert sorted(process.exitcode or 0 for process in processes) == [0, 2, 2, 2]
    assert read(tmp_path / "run")["global_step"] == 20
    assert len(list((tmp_path / "run").glob("events.*"))) == 1


def test_run_goes_on_in_one_process_at_a_time(tmp_path: Path, fails: Callable[..., str]) -> None:
    run_dir = tmp_path / "run"
    process = child("fit", *SMALL, "--trainer.max_epochs=10000", f"--run_dir={run_dir}")
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "last.ckpt").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = (run_dir / "config.yaml").read_bytes()

    error = fails("fit", f"--ckpt_path={run_dir}", "--model.lr=0.5", "--trainer.max_epochs=1")

    assert str(run_dir) in error
    assert (run_dir / "config.yaml").read_bytes() == before
    main(["test", f"--ckpt_path={run_dir}"])  # looking is free
    assert process.is_alive()
    process.kill()
    process.join()
    resume(run_dir, f"--trainer.max_steps={read(run_dir)['global_step'] + 1}")


# Downloads


PATIENT = {"timeout": 60}


def test_downloads_into_the_same_folder_at_once(tmp_path: Path, mirror: Mirror) -> None:
    args = (tmp_path, mirror.url("slow"))
    processes = [CHILDREN.Process(target=fetch, args=args, kwargs=PATIENT) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(mirror.requests) == sorted(f"/slow/{name}.gz" for name in FILES)


def test_download_that_is_killed_is_in_nobodys_way(tmp_path: Path, mirror: Mirror) -> None:
    process = CHILDREN.Process(target=fetch, args=(tmp_path, mirror.url("hanging")), kwargs=PATIENT)
    process.start()
    raw = tmp_path / "MNIST" / "raw"
    while not mirror.requests:
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    fetch(tmp_path, mirror.url("good"))
    assert {file.name for file in raw.iterdir() if not file.name.startswith(".")} == {f"{name}.gz" for name in FILES}
