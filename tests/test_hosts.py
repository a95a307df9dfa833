"""Two machines: network namespaces with addresses of their own, a cable between them, and what happens if it is cut."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from launch import DDP, FOREVER, Command, assert_goes_on, last, wait_for
from postgresql import Server, serving
from runs import assert_same, learned
from test_storages import SCRIPT, config, numbers

pytestmark = pytest.mark.slow

ADDRESSES = {"one": "10.99.77.1", "two": "10.99.77.2"}
CABLE = "cable0"
# Host names say nothing in there, of which torch complains: whoever looks for an address has to be told one.
NETWORK = {"GLOO_SOCKET_IFNAME": CABLE, "TORCH_CPP_LOG_LEVEL": "ERROR"}


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
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        processes.append(process)
        return process

    return start


def trials(server: Server) -> list[Any]:
    """All trials, read on the database's host."""
    attributes = "SELECT trial_id, key, value_json FROM trial_user_attributes"
    attributes += " UNION SELECT trial_id, key, value_json FROM trial_system_attributes"
    columns = "trials.number, trials.state, key, value_json"
    query = f"SELECT {columns} FROM trials LEFT JOIN ({attributes}) AS attributes USING (trial_id) ORDER BY 1"
    found: dict[int, Any] = {}
    for line in server.query(query, "tiny"):
        number, state, key, value = line.split("\t")
        found.setdefault(int(number), {"number": int(number), "state": state})
        if key:
            found[int(number)][key] = json.loads(value)
    return list(found.values())


def host_of(trial: dict[str, Any], tmp_path: Path) -> str:
    overlay = f"logs/search/tiny/overlays/{trial['number']:04d}.yaml"
    return next(host for host in ADDRESSES if (tmp_path / host / overlay).exists())


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_complete(server: Server, tmp_path: Path, num_trials: int = 8) -> list[dict[str, Any]]:
    """Return the trials that were lost; there are as many results as asked for, or one more if both began the last."""
    everything = trials(server)
    retried = {number for trial in everything for number in trial.get("retry_history", [])}
    results = [trial for trial in everything if trial["number"] not in retried]
    assert num_trials <= len(results) <= num_trials + 1
    assert {trial["state"] for trial in results} == {"COMPLETE"}
    assert len({str(trial["params"]) for trial in results}) == len(results)
    assert {trial["state"] for trial in everything} <= {"COMPLETE", "FAIL"}
    assert numbers(tmp_path / "one/logs/search/tiny") == [trial["number"] for trial in results]
    return [trial for trial in everything if trial["number"] in retried]


def logs(tmp_path: Path) -> str:
    return "".join(f"---- {host}\n{(tmp_path / host / 'log').read_text()}" for host in ADDRESSES)


def test_trial_of_a_host_that_is_cut_off_runs_again_elsewhere(
    hosts: Hosts,
    server: Server,
    search: Callable[..., "subprocess.Popen[bytes]"],
    tmp_path: Path,
) -> None:
    url = server.database("tiny")
    one, two = [search(host, url) for host in ADDRESSES]
    wait_until(lambda: any(tmp_path.glob("two/logs/search/tiny/trials/*")))
    time.sleep(random.uniform(0, 3))
    hosts.cut()
    assert one.wait(timeout=400) == 0, logs(tmp_path)
    (lost,) = assert_complete(server, tmp_path)
    assert host_of(lost, tmp_path) == "two"
    (again,) = [trial for trial in trials(server) if "retry_history" in trial]
    assert (host_of(again, tmp_path), again["params"]) == ("one", lost["params"])
    assert "waiting for the database: " in (tmp_path / "two" / "log").read_text()
    assert two.poll() is None
    before = trials(server)

    hosts.plug()

    assert two.wait(timeout=120) == 0, logs(tmp_path)
    assert trials(server) == before
    assert numbers(tmp_path / "two/logs/search/tiny") == numbers(tmp_path / "one/logs/search/tiny")


def test_what_a_host_had_locked_when_it_was_cut_off_is_free_again(hosts: Hosts, server: Server) -> None:
    """The other host would wait for the end of its transaction; by itself the server notices after two hours."""
    url = server.database("tiny")
    script = (
        "import sys, time; from mnist_lit.search.storage import open_database; from sqlalchemy import text\n"
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


# A run on both


@pytest.fixture
def node(hosts: Hosts) -> Iterator[Callable[..., Command]]:
    """`node(host, *args, python=, ...)`: the part of a run that is on one host; the folder is shared."""
    commands: list[Command] = []

    def start(host: str, *args: str, python: Sequence[str] = (), **environment: str) -> Command:
        flags = [*SMALL, *DDP, "--trainer.num_nodes=2", "--run_dir=run", *args]
        python = [*python, "-m", "mnist_lit", "fit", *flags]
        commands.append(Command(python, {**NETWORK, **environment}, hosts.on(host)))
        return commands[-1]

    yield start
    for command in commands:
        command.kill()


@pytest.fixture
def torchrun(node: Callable[..., Command]) -> Callable[..., dict[str, Command]]:
    """`torchrun(*args)`: a run with one process on each host."""
    place = ["--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES['one']}:29500", "--rdzv_id=run"]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *place]

    def start(*args: str) -> dict[str, Command]:
        both = {}
        for host, address in ADDRESSES.items():
            who = [f"--local_addr={address}", f"--rdzv_conf=is_host={int(host == 'one')}"]
            both[host] = node(host, "--trainer.devices=1", *args, python=[*launcher, *who])
        return both

    return start


@pytest.fixture
def on_one_machine(tmp_path: Path) -> Path:
    """The directory of the same run with both processes on one machine."""
    command = Command(["-m", "mnist_lit", "fit", *SMALL, *DDP, "--trainer.devices=2", "--run_dir=alone"], {})
    code, _, errors = command.end()
    assert code == 0, errors
    return tmp_path / "alone"


def facts(run_dir: Path) -> dict[str, Any]:
    metrics = json.loads((run_dir / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name not in ("seconds", "images_per_second")}


def test_torchrun_on_two_hosts_trains_as_two_processes_on_one(
    torchrun: Callable[..., dict[str, Command]], on_one_machine: Path, tmp_path: Path
) -> None:
    ended = [command.end() for command in torchrun().values()]
    assert [code for code, *_ in ended] == [0, 0], ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "run"]
    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    assert facts(tmp_path / "run") == facts(on_one_machine)
    assert_same(learned(tmp_path / "run"), learned(on_one_machine))


@pytest.mark.parametrize("host", ADDRESSES)
def test_host_whose_processes_are_killed_ends_the_other(host: str, torchrun: Callable[..., dict[str, Command]]) -> None:
    both = torchrun(FOREVER)
    wait_for(last(), both["one"])
    start = time.monotonic()
    both[host].kill()
    (other,) = set(ADDRESSES) - {host}
    code, _, errors = both[other].end(60)
    assert time.monotonic() - start < 60
    assert code == 1
    assert "error: another of the 2 processes is gone or silent: " in errors, errors
    assert "what was done is kept; go on with: python -m mnist_lit fit --ckpt_path " in errors
    assert_goes_on(errors)
