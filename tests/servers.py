"""The real servers that the tests use: where they are, and databases of our own on them."""

import os
import random
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

POSTGRES_URL = os.environ.get("TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
MYSQL_URL = os.environ.get("TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/")
REDIS_URL = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
REDIS_SERVER = os.environ.get("TEST_REDIS_SERVER", "redis-server")
PGBOUNCER = os.environ.get("TEST_PGBOUNCER", "pgbouncer")
# As whoever runs the tests; the one in the path is for root, and begins it as another user.
RABBITMQ_SERVER = os.environ.get("TEST_RABBITMQ_SERVER", "/usr/lib/rabbitmq/bin/rabbitmq-server")
REQUIRE_ALL = os.environ.get("TEST_REQUIRE_ALL_BACKENDS") == "1"


def unavailable(backend: str, reason: object, how: str) -> None:
    """Skip the tests of a backend by its name; where all must be there, fail."""
    message = f"{backend}: {' '.join(str(reason).split())} - to enable it, {how}"
    if REQUIRE_ALL:
        pytest.fail(message)
    pytest.skip(message)


def with_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@contextmanager
def postgres_database() -> Iterator[str]:
    """Make a database of our own on the PostgreSQL server, and give its URL."""
    import psycopg

    name = f"workflow_storage_test_{uuid.uuid4().hex[:12]}"
    try:
        server = psycopg.connect(POSTGRES_URL, autocommit=True, connect_timeout=3)
    except psycopg.Error as exc:
        unavailable(
            "PostgreSQL", exc, "start a server and set TEST_POSTGRES_URL=postgresql://user@host/db"
        )
    with server:
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield with_database(POSTGRES_URL, name)
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def pgbouncer(url: str) -> Iterator[str]:
    """Start a pooler that shares sessions out by the transaction, and give its URL."""
    import psycopg

    parts = urlsplit(url)
    (port,) = free_ports(1)
    server = f"host={parts.hostname} port={parts.port or 5432} user={parts.username or 'postgres'}"
    if parts.password:
        server += f" password={parts.password}"
    name = parts.path.lstrip("/")
    with tempfile.TemporaryDirectory(prefix="workflow-storage-pgbouncer-") as folder:
        settings = Path(folder) / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n{name} = {server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {port}\nunix_socket_dir =\nauth_type = any\n"
            "pool_mode = transaction\ndefault_pool_size = 2\n"
        )
        command = [PGBOUNCER, "--quiet", str(settings)]
        if os.getuid() == 0:  # as whom it refuses to run
            Path(folder).chmod(0o755)
            command[1:1] = ["--user", "nobody"]
        try:
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        except OSError as exc:
            unavailable("PgBouncer", exc, "install pgbouncer, or set TEST_PGBOUNCER to its path")
        try:
            pooled = f"postgresql://pooled@127.0.0.1:{port}/{name}"

            def is_up() -> bool:
                with suppress(psycopg.Error), psycopg.connect(pooled, connect_timeout=3):
                    return True
                return False

            wait_until(is_up)
            yield pooled
        finally:
            process.terminate()
            process.wait(timeout=30)


@contextmanager
def mysql_database() -> Iterator[str]:
    """Make a database of our own on the MariaDB or MySQL server, and give its URL."""
    how = (
        "pip install mysqlclient (it needs a compiler and libmariadb-dev), start a server and "
        "set TEST_MYSQL_URL=mysql://user@host/"
    )
    try:
        import MySQLdb
    except ImportError as exc:
        unavailable("MariaDB or MySQL", exc, how)
    parts = urlsplit(MYSQL_URL)
    name = f"workflow_storage_test_{uuid.uuid4().hex[:12]}"
    try:
        server = MySQLdb.connect(
            host=parts.hostname or "127.0.0.1",
            port=parts.port or 3306,
            user=parts.username or "root",
            password=parts.password or "",
            connect_timeout=3,
        )
    except MySQLdb.Error as exc:
        unavailable("MariaDB or MySQL", exc, how)
    cursor = server.cursor()
    # latin1, so that nothing depends on the database's own character set.
    cursor.execute(f"CREATE DATABASE {name} CHARACTER SET latin1")
    try:
        yield with_database(MYSQL_URL, name)
    finally:
        cursor.execute(f"DROP DATABASE {name}")
        server.close()


@contextmanager
def redis_keys() -> Iterator[str]:
    """Take a key prefix of our own on the Redis server, and give the URL with it."""
    import redis

    client = redis.Redis.from_url(REDIS_URL, socket_connect_timeout=3)
    try:
        client.ping()
    except redis.RedisError as exc:
        unavailable("Redis", exc, "start a server and set TEST_REDIS_URL=redis://host:port/db")
    prefix = f"workflow_storage_test_{uuid.uuid4().hex[:12]}"
    try:
        yield f"{REDIS_URL}?prefix={prefix}"
    finally:
        delete_keys(client, prefix)
        client.close()


def delete_keys(client, prefix: str) -> None:
    """Delete all keys of a prefix on a server."""
    # One at a time, for those of a cluster are in several slots.
    pipeline = client.pipeline(transaction=False)
    for key in client.scan_iter(match=f"{{{prefix}*", count=1000):
        pipeline.unlink(key)
    pipeline.execute()


class RedisServers:
    """Redis servers of our own on free ports, in a folder; a cluster, with or without replicas."""

    def __init__(self, folder: Path, count: int, *options: str) -> None:
        self.folder = folder
        self.ports = free_ports(count)
        self.options = options
        self.processes: dict[int, subprocess.Popen] = {}

    def __enter__(self):
        try:
            for port in self.ports:
                self.start(port)
            for port in self.ports:
                self.client(port)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info):
        for port in list(self.processes):
            self.kill(port)

    def start(self, port: int) -> None:
        folder = self.folder / str(port)
        folder.mkdir(exist_ok=True)
        command = [REDIS_SERVER, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        try:
            self.processes[port] = subprocess.Popen(
                [*command, *self.options], cwd=folder, stdout=subprocess.DEVNULL
            )
        except OSError as exc:
            unavailable(
                "Redis Cluster", exc, "install redis-server, or set TEST_REDIS_SERVER to its path"
            )

    def kill(self, port: int) -> None:
        process = self.processes.pop(port)
        process.kill()
        process.wait(timeout=30)

    def client(self, port: int):
        """Return a client of a server that answers."""
        import redis

        client = redis.Redis(port=port, socket_timeout=10)
        wait_until(lambda: answers(client))
        return client

    def make_cluster(self, masters: int) -> str:
        """Make them a cluster, the first ones masters and each of the others a replica of one.

        Returns:
            Its URL.
        """
        clients = [self.client(port) for port in self.ports]
        for client in clients[1:]:
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.ports[0])
        for number, client in enumerate(clients[:masters]):
            first, end = (16384 * place // masters for place in (number, number + 1))
            client.execute_command("CLUSTER", "ADDSLOTS", *range(first, end))
        wait_until(lambda: all(knows(client, len(clients)) for client in clients))
        for number, client in enumerate(clients[masters:]):
            master = clients[number % masters].execute_command("CLUSTER", "MYID")
            client.execute_command("CLUSTER", "REPLICATE", master)
        wait_until(lambda: all(is_ready(client) for client in clients))
        for client in clients[masters:]:
            wait_until(
                lambda client=client: client.info("replication")["master_link_status"] == "up"
            )
        nodes = ",".join(f"127.0.0.1:{port}" for port in self.ports[:masters])
        return f"redis+cluster://{nodes}"


@contextmanager
def redis_cluster(masters: int = 3, replicas: int = 0, *options: str) -> Iterator[RedisServers]:
    """Start a cluster, and give its servers, with its URL as `url`."""
    with tempfile.TemporaryDirectory(prefix="workflow-storage-redis-") as folder:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *options)
        with RedisServers(Path(folder), masters * (1 + replicas), *options) as servers:
            servers.url = servers.make_cluster(masters)
            yield servers


class Sentinels(RedisServers):
    """A master, replicas of it, and three sentinels that watch them; the URL is in `url`."""

    def __init__(self, folder: Path, replicas: int = 1) -> None:
        super().__init__(folder, 1 + replicas)
        self.watching = free_ports(3)
        nodes = ",".join(f"127.0.0.1:{port}" for port in self.watching)
        self.url = f"redis+sentinel://{nodes}/the-master"

    def __enter__(self):
        super().__enter__()
        try:
            for port in self.ports[1:]:
                replica = self.client(port)
                replica.replicaof("127.0.0.1", self.ports[0])
                wait_until(lambda r=replica: r.info("replication")["master_link_status"] == "up")
            for port in self.watching:
                self.start_sentinel(port)
            for port in self.watching:
                client = self.client(port)
                wait_until(lambda c=client: self.is_watched_by(c))
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_sentinel(self, port: int) -> None:
        file = self.folder / f"sentinel-{port}.conf"
        file.write_text(
            f"port {port}\nbind 127.0.0.1\n"
            f"sentinel monitor the-master 127.0.0.1 {self.ports[0]} 2\n"
            "sentinel down-after-milliseconds the-master 500\n"
            "sentinel failover-timeout the-master 3000\n"
        )
        self.processes[port] = subprocess.Popen(
            [REDIS_SERVER, str(file), "--sentinel"], cwd=self.folder, stdout=subprocess.DEVNULL
        )

    def is_watched_by(self, sentinel) -> bool:
        """Whether a sentinel knows the others, and the replicas."""
        fields = sentinel.execute_command("SENTINEL", "MASTER", "the-master")
        known = (
            fields
            if isinstance(fields, dict)
            else dict(zip(fields[::2], fields[1::2], strict=True))
        )
        known = {str(k.decode() if isinstance(k, bytes) else k): v for k, v in known.items()}
        return (int(known["num-other-sentinels"]), int(known["num-slaves"])) == (
            len(self.watching) - 1,
            len(self.ports) - 1,
        )


@contextmanager
def rabbitmq() -> Iterator[str]:
    """Start a RabbitMQ server of our own on free ports, and give its URL."""
    port, own_port, names_port = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="workflow-storage-rabbitmq-") as folder:
        for name, text in (("environment", ""), ("plugins", "[].")):
            (Path(folder) / name).write_text(text)
        environment = {
            **os.environ,
            "HOME": folder,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(names_port),
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/environment",
            "RABBITMQ_CONFIG_FILE": f"{folder}/none",
            "RABBITMQ_DIST_PORT": str(own_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_NODENAME": f"test{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_PID_FILE": f"{folder}/pid",
        }
        processes = []
        try:
            # It would start the first one itself, and leave it.
            for command in (["epmd", "-port", str(names_port)], [RABBITMQ_SERVER]):
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=folder,
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
            wait_until(lambda: listens(port) or processes[-1].poll() is not None, 60)
            if not listens(port):
                unavailable("RabbitMQ", "it has ended", "see what it says")
            yield f"amqp://guest:guest@127.0.0.1:{port}//"
        except OSError as exc:
            unavailable(
                "RabbitMQ", exc, "install rabbitmq-server, or set TEST_RABBITMQ_SERVER to its path"
            )
        finally:
            for process in reversed(processes):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=30)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def free_ports(count: int) -> list[int]:
    """Return free ports whose cluster bus, 10,000 above, is free too."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.socket() as one, socket.socket() as bus:
            one.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            if port not in ports:
                ports.append(port)
    return ports


def answers(client) -> bool:
    import redis

    try:
        return client.ping()
    except redis.RedisError:
        return False


def knows(client, count: int) -> bool:
    return client.cluster("INFO")["cluster_known_nodes"] == str(count)


def is_ready(client) -> bool:
    return client.cluster("INFO")["cluster_state"] == "ok"


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
