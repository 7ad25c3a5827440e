"""Clusters of our own on free ports: PostgreSQL with a standby, and three Galera nodes."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.servers import free_ports, unavailable, wait_until

POSTGRES_PROGRAMS = os.environ.get("TEST_POSTGRES_PROGRAMS", "/usr/lib/postgresql/*/bin")
GALERA = Path(os.environ.get("TEST_GALERA", "/usr/lib/galera/libgalera_smm.so"))
MARIADB = shutil.which("mariadbd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class Servers:
    """Processes of our own in a temporary folder, each stopped by its id."""

    def __init__(self, folder: Path, user: str) -> None:
        self.folder = folder
        self.processes: dict[int, subprocess.Popen] = {}
        self.popen_options: dict[str, Any] = {"cwd": folder}
        if not os.getuid():  # as whom they refuse to run
            self.popen_options |= {"user": user, "group": user, "extra_groups": []}
            shutil.chown(folder, user, user)

    def start(self, port: int, command: list[str]) -> None:
        with (self.folder / f"{port}.log").open("ab") as log:
            self.processes[port] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, **self.popen_options
            )

    def run(self, *command: str | Path) -> None:
        """Run a program to its end."""
        subprocess.run(command, check=True, capture_output=True, timeout=120, **self.popen_options)

    def kill(self, port: int) -> None:
        process = self.processes.pop(port)
        process.kill()
        process.wait(timeout=30)

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for port, process in list(self.processes.items()):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.kill(port)

    def log(self, port: int) -> str:
        return (self.folder / f"{port}.log").read_text(errors="replace")

    def wait_until(self, port: int, condition) -> None:
        """Wait until a server is ready; if it has ended, say what it wrote last."""

        def ready() -> bool:
            process = self.processes[port]
            assert process.poll() is None, self.log(port)[-9000:]
            return condition()

        wait_until(ready, 90)


class PostgresPair(Servers):
    """A primary, and a standby that has a transaction before it is acknowledged.

    Attributes:
        primary: the port of the one.
        standby: the port of the other.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        super().__init__(folder, "postgres")
        self.programs = programs
        self.primary, self.standby = free_ports(2)

    @property
    def url(self) -> str:
        """The URL that finds whichever of the two takes writes."""
        return (
            "postgresql://postgres@/postgres?host=127.0.0.1,127.0.0.1"
            f"&port={self.primary},{self.standby}&target_session_attrs=read-write"
        )

    def url_of(self, port: int) -> str:
        return f"postgresql://postgres@127.0.0.1:{port}/postgres"

    def begin(self) -> None:
        self.run(
            self.programs / "initdb", "-D", "primary", "-U", "postgres", "-A", "trust", "--no-sync"
        )
        self.serve(self.primary, "primary", "synchronous_standby_names=*")
        self.wait_until(self.primary, lambda: self.accepts(self.primary, is_standby=False))
        at_primary = ["-h", "127.0.0.1", "-p", str(self.primary), "-U", "postgres"]
        self.run(
            self.programs / "pg_basebackup",
            *("-D", "standby", *at_primary, "-R", "-c", "fast", "--no-sync"),
        )
        self.serve(self.standby, "standby")
        self.wait_until(self.standby, lambda: self.accepts(self.standby, is_standby=True))

        def is_synchronous() -> bool:
            return bool(
                self.select(
                    self.primary, "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
                )
            )

        wait_until(is_synchronous)

    def promote(self) -> None:
        self.run(self.programs / "pg_ctl", "promote", "-D", "standby")

    def serve(self, port: int, data: str, *settings: str) -> None:
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=", *settings)
        options = [part for setting in settings for part in ("-c", setting)]
        command = [str(self.programs / "postgres"), "-D", data, "-p", str(port), *options]
        self.start(port, command)

    def accepts(self, port: int, *, is_standby: bool) -> bool:
        import psycopg

        with suppress(psycopg.OperationalError):
            return self.select(port, "SELECT pg_is_in_recovery()") == [(is_standby,)]
        return False

    def select(self, port: int, sql: str) -> list[Any]:
        import psycopg

        with psycopg.connect(self.url_of(port), autocommit=True, connect_timeout=3) as connection:
            return connection.execute(sql).fetchall()


@contextmanager
def postgres_pair() -> Iterator[PostgresPair]:
    """Start a primary with a synchronous standby."""
    programs = sorted(Path("/").glob(f"{POSTGRES_PROGRAMS.lstrip('/')}/initdb"))
    if not programs:
        unavailable(
            "PostgreSQL with a standby",
            f"there is no initdb in {POSTGRES_PROGRAMS}",
            "install postgresql, or set TEST_POSTGRES_PROGRAMS to the folder of initdb",
        )
    with tempfile.TemporaryDirectory(prefix="workflow-storage-postgres-") as folder:
        pair = PostgresPair(Path(folder), programs[-1].parent)
        try:
            pair.begin()
            yield pair
        finally:
            pair.stop()


class GaleraNodes(Servers):
    """MariaDB servers that each take writes, and agree on every transaction.

    Attributes:
        ports: where the servers listen.
    """

    def __init__(self, folder: Path, count: int = 3) -> None:
        super().__init__(folder, "mysql")
        numbers = free_ports(count * 4)
        self.ports = numbers[:count]
        self._peers = {
            port: numbers[count + 3 * place : count + 3 * place + 3]
            for place, port in enumerate(self.ports)
        }

    def url_of(self, port: int, database: str = "workflows") -> str:
        return f"mysql://root@127.0.0.1:{port}/{database}"

    @property
    def urls(self) -> list[str]:
        """The URL of each node that runs."""
        return [self.url_of(port) for port in self.ports if port in self.processes]

    def begin(self) -> None:
        first, *others = self.ports
        self.run(
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={self._data(first)}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )
        self._serve(first, "--wsrep-new-cluster")
        self._wait(first, nodes=1)
        self.execute(first, "CREATE DATABASE workflows CHARACTER SET utf8mb4")
        # A copy of what the first one holds has nothing to be sent when it joins.
        process = self.processes.pop(first)
        process.terminate()
        process.wait(timeout=30)
        for port in others:
            self.run("cp", "-a", self._data(first), self._data(port))
        self._serve(first, "--wsrep-new-cluster")
        self._wait(first, nodes=1)
        for port in others:
            self._serve(port)
        for port in self.ports:
            self._wait(port, nodes=len(self.ports))

    def _data(self, port: int) -> Path:
        return self.folder / str(port)

    def _serve(self, port: int, *options: str) -> None:
        peers, states, transfers = self._peers[port]
        group = ",".join(f"127.0.0.1:{numbers[0]}" for numbers in self._peers.values())
        provider = ";".join(
            (
                f"gmcast.listen_addr=tcp://127.0.0.1:{peers}",
                f"ist.recv_addr=127.0.0.1:{states}",
                f"base_port={peers}",
                "gcache.size=16M",
                # A node that was killed is given up after seconds.
                "evs.keepalive_period=PT0.5S",
                "evs.suspect_timeout=PT2S",
                "evs.inactive_timeout=PT4S",
            )
        )
        settings = {
            "datadir": self._data(port),
            "socket": self.folder / f"{port}.sock",
            "pid_file": self.folder / f"{port}.pid",
            "bind_address": "127.0.0.1",
            "port": port,
            "binlog_format": "ROW",
            "innodb_autoinc_lock_mode": 2,
            "innodb_flush_log_at_trx_commit": 0,
            "innodb_buffer_pool_size": "64M",
            "wsrep_on": "ON",
            "wsrep_provider": GALERA,
            "wsrep_provider_options": f'"{provider}"',
            "wsrep_cluster_address": f"gcomm://{group}",
            "wsrep_node_address": f"127.0.0.1:{peers}",
            "wsrep_sst_receive_address": f"127.0.0.1:{transfers}",
            "wsrep_sst_method": "rsync",
        }
        # In a file, for the script that sends one node's state to another reads them, too.
        file = self.folder / f"{port}.cnf"
        lines = (f"{name} = {value}\n" for name, value in settings.items())
        file.write_text(f"[mysqld]\n{''.join(lines)}")
        command = [str(MARIADB), f"--defaults-file={file}", *options]
        self.start(port, command)

    def _wait(self, port: int, *, nodes: int) -> None:
        import MySQLdb

        def is_synced() -> bool:
            with suppress(MySQLdb.Error):
                status = dict(self.execute(port, "SHOW STATUS LIKE 'wsrep_%'"))
                return (
                    status["wsrep_ready"] == "ON"
                    and status["wsrep_local_state_comment"] == "Synced"
                    and status["wsrep_cluster_size"] == str(nodes)
                )
            return False

        self.wait_until(port, is_synced)

    def execute(self, port: int, sql: str) -> Any:
        import MySQLdb

        connection = MySQLdb.connect(host="127.0.0.1", port=port, user="root", connect_timeout=3)
        try:
            connection.autocommit(True)
            cursor = connection.cursor()
            cursor.execute(sql)
            return cursor.fetchall()
        finally:
            connection.close()


@contextmanager
def galera_nodes() -> Iterator[GaleraNodes]:
    """Start three Galera nodes."""
    how = "pip install mysqlclient, and install mariadb-server and galera-4"
    try:
        import MySQLdb  # noqa: F401
    except ImportError as exc:
        unavailable("Galera", exc, how)
    if not GALERA.exists():
        unavailable("Galera", f"there is no {GALERA}", f"{how}, or set TEST_GALERA to its path")
    if not MARIADB:
        unavailable("Galera", "there is no mariadbd", how)
    with tempfile.TemporaryDirectory(prefix="workflow-storage-galera-") as folder:
        nodes = GaleraNodes(Path(folder))
        try:
            nodes.begin()
            yield nodes
        finally:
            nodes.stop()
