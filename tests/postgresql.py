"""A real PostgreSQL server for tests: at any address, and it can be stopped and started again."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

PASSWORD = "swordfish"


class Server:
    """A server with data of its own in an empty folder; a prefix before its command line starts it elsewhere."""

    def __init__(self, folder: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self.folder = folder
        self.address = address
        self.prefix = prefix
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"postgresql://mnist:{PASSWORD}@{address}:{self.port}"
        self.user: list[str] = []
        if os.geteuid() == 0:  # the server refuses to be root
            user = pwd.getpwnam("nobody")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self.user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        (folder / "password").write_text(PASSWORD)
        initdb = [program("initdb"), "-D", "data", "-U", "mnist", "-A", "scram-sha-256", "--pwfile=password", "-N"]
        subprocess.run([*self.user, *initdb], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with (folder / "data" / "pg_hba.conf").open("a") as file:
            file.write("host all all samenet scram-sha-256\n")
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        flags = ["-p", str(self.port), "-k", "", "-c", f"listen_addresses={self.address}", "-c", "fsync=off"]
        command = [*self.prefix, *self.user, program("postgres"), "-D", "data", *flags]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def stop(self, signum: int = signal.SIGINT) -> None:
        """End it: SIGINT is its "fast" shutdown, SIGQUIT its "immediate" one, which is a crash."""
        self.process.send_signal(signum)
        self.process.wait(timeout=60)

    def database(self, name: str) -> str:
        """The URL of a new, empty database."""
        self.query(f"CREATE DATABASE {name}")
        return f"{self.url}/{name}"

    def query(self, query: str, database: str = "postgres") -> list[str]:
        """The rows of a query, asked beside the server; their columns are parted by tabs."""
        url = f"{self.url}/{database}?connect_timeout=5"
        command = [*self.prefix, program("psql"), "-qAtX", "-F", "\t", "-d", url, "-c", query]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()

    def _answers(self) -> bool:
        try:
            return self.query("SELECT 1") == ["1"]
        except subprocess.CalledProcessError:
            return False


@contextmanager
def serving(address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Iterator[Server]:
    """`with serving() as server`: a server that ends with the block."""
    # Not in pytest's folder, into which the server's user may not look.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder), address, prefix)
        try:
            yield server
        finally:
            server.stop()


def program(name: str) -> str:
    """The path of one of the server's programs, which Debian keeps out of the path."""
    found = shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
    if found is None:
        pytest.skip(f"needs PostgreSQL's {name}: apt-get install postgresql")
    return found
