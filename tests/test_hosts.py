"""Two machines: network namespaces with addresses of their own, a cable between them, and what happens if it is cut."""

import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState
from postgresql import Server, serving
from test_storages import SCRIPT, config, numbers

pytestmark = pytest.mark.slow

ADDRESSES = {"one": "10.99.77.1", "two": "10.99.77.2"}
CABLE = "cable0"


class Hosts:
    """The hosts `one` and `two`."""

    def __init__(self) -> None:
        self.names = {host: f"mnist-{os.getpid()}-{host}" for host in ADDRESSES}

    def make(self) -> None:
        """Bring them into being."""
        for host in ADDRESSES:
            self._ip("netns", "add", self.names[host])
        peer = ["peer", "name", CABLE, "netns", self.names["two"]]
        self._ip("link", "add", CABLE, "netns", self.names["one"], "type", "veth", *peer)
        for host, address in ADDRESSES.items():
            self._ip("-n", self.names[host], "addr", "add", f"{address}/24", "dev", CABLE)
            self._ip("-n", self.names[host], "link", "set", "lo", "up")
        self.plug()

    def plug(self) -> None:
        """Join them."""
        for name in self.names.values():
            self._ip("-n", name, "link", "set", CABLE, "up")

    def cut(self) -> None:
        """Cut the cable: neither hears of the other any more, and nobody is told."""
        self._ip("-n", self.names["two"], "link", "set", CABLE, "down")

    def on(self, host: str) -> list[str]:
        """What stands before a command line to run it on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def alone_on(self, host: str, hidden: Path) -> list[str]:
        """The same, for one that does not see a folder of the other."""
        script = 'mount -t tmpfs hidden "$0" && exec "$@"'
        return [*self.on(host), "unshare", "--mount", "sh", "-c", script, str(hidden)]

    def remove(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _ip(self, *args: str) -> None:
        subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts on this machine."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    both = Hosts()
    try:
        both.make()
    except subprocess.CalledProcessError as error:
        both.remove()
        pytest.skip(f"no network namespaces here: {error.stderr}")
    yield both
    both.remove()


# A search on both


@pytest.fixture
def server(hosts: Hosts) -> Iterator[Server]:
    """A database on the first host, which both can reach."""
    with serving(ADDRESSES["one"], hosts.on("one")) as server:
        yield server


@pytest.fixture
def search(
    hosts: Hosts, tmp_path: Path, processes: list["subprocess.Popen[Any]"]
) -> Callable[..., "subprocess.Popen[bytes]"]:
    """`search(host, url)`: a search of eight trials of some seconds, in a folder that the other host does not see."""
    for host in ADDRESSES:
        (tmp_path / host).mkdir()

    def start(host: str, url: str, **changes: Any) -> "subprocess.Popen[bytes]":
        folder = tmp_path / host
        (other,) = set(ADDRESSES) - {host}
        overrides = {"trainer.max_epochs": 30, "model.channels": [4], "model.hidden": [], "checkpoint.enabled": False}
        flag = config(folder, storage=url, **{"n_trials": 8, "overrides": overrides, "pruner": None, **changes})
        command = [*hosts.alone_on(host, tmp_path / other), sys.executable, SCRIPT, flag]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        processes.append(process)
        return process

    return start


def trials(hosts: Hosts, url: str) -> list[FrozenTrial]:
    """All trials, read on the database's host."""
    code = "import optuna, pickle, sys; study = optuna.load_study(study_name='tiny', storage=sys.argv[1]);"
    code += "sys.stdout.buffer.write(pickle.dumps(study.trials))"
    command = [*hosts.on("one"), sys.executable, "-c", code, url]
    found: list[FrozenTrial] = pickle.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def host_of(trial: FrozenTrial, tmp_path: Path) -> str:
    overlay = f"logs/search/tiny/overlays/{trial.number:04d}.yaml"
    return next(host for host in ADDRESSES if (tmp_path / host / overlay).exists())


def test_trial_of_a_host_that_is_cut_off_runs_again_elsewhere(
    hosts: Hosts, server: Server, search: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    url = server.database("tiny")
    one, two = [search(host, url) for host in ADDRESSES]
    while not any(tmp_path.glob("two/logs/search/tiny/trials/*")):
        assert two.poll() is None
        time.sleep(0.1)
    time.sleep(random.uniform(0, 3))
    hosts.cut()
    assert one.wait(timeout=400) == 0, (tmp_path / "one" / "log").read_text()
    everything = trials(hosts, url)
    (again,) = [trial for trial in everything if "retry_history" in trial.system_attrs]
    (number,) = again.system_attrs["retry_history"]
    lost = everything.pop(number)
    assert (host_of(lost, tmp_path), host_of(again, tmp_path), lost.params) == ("two", "one", again.params)
    assert 8 <= len(everything) <= 9, "both may begin the last one at the same moment"
    assert {trial.state for trial in everything} == {TrialState.COMPLETE}
    assert numbers(tmp_path / "one/logs/search/tiny") == [trial.number for trial in everything]
    assert "waiting for the database: " in (tmp_path / "two" / "log").read_text()
    assert two.poll() is None

    hosts.plug()

    assert two.wait(timeout=120) == 0, (tmp_path / "two" / "log").read_text()
    assert len(trials(hosts, url)) == len(everything) + 1
    assert numbers(tmp_path / "two/logs/search/tiny") == numbers(tmp_path / "one/logs/search/tiny")


def test_what_a_host_had_locked_when_it_was_cut_off_is_free_again(hosts: Hosts, server: Server) -> None:
    """The other host would wait for the end of its transaction; by itself the server notices after two hours."""
    url = server.database("tiny")
    script = (
        "import sys, time; from mnist_lit.search.study import open_database; from sqlalchemy import text\n"
        "with open_database(sys.argv[1]).engine.connect() as connection:\n"
        "    connection.execute(text('LOCK TABLE studies')); print('locked', flush=True); time.sleep(600)"
    )
    command = [*hosts.on("two"), sys.executable, "-c", script, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        hosts.cut()
        start = time.monotonic()
        server.query("SELECT count(*) FROM studies", "tiny")
        assert 1 < time.monotonic() - start < 90
        process.kill()
