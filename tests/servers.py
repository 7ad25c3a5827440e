"""The real servers that the tests use: where they are, and databases of our own on them."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import pytest

POSTGRES_URL = os.environ.get("TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
MYSQL_URL = os.environ.get("TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/")
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
def mysql_database() -> Iterator[str]:
    """Make a database of our own on the MariaDB or MySQL server, and give its URL."""
    how = (
        "pip install mysqlclient (it needs a compiler and libmariadb-dev), start a server and "
        "set TEST_MYSQL_URL=mysql://user@host/"
    )
    try:
        import MySQLdb
    except ImportError as exc:
        unavailable("MariaDB", exc, how)
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
        unavailable("MariaDB", exc, how)
    cursor = server.cursor()
    # latin1, so that nothing depends on the database's own character set.
    cursor.execute(f"CREATE DATABASE {name} CHARACTER SET latin1")
    try:
        yield with_database(MYSQL_URL, name)
    finally:
        cursor.execute(f"DROP DATABASE {name}")
        server.close()
