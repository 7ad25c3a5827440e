"""What is told apart when a database refuses something, and what is advised, on real servers."""

import sqlite3
import uuid
from urllib.parse import quote, urlsplit, urlunsplit

import django.db
import pytest
from django.db import connections

from tests.servers import MYSQL_URL, POSTGRES_URL, with_database
from workflow_storage import StorageError, StorageUnavailableError, create_storage_backend
from workflow_storage.backends.orm.errors import storage_error
from workflow_storage.config import registered_aliases
from workflow_storage.factory import forget
from workflow_storage.testing import new_run, stored_run


@pytest.fixture
def open_at(django_db_blocker):
    """Open stores at URLs that are forgotten after the test, if they are new."""
    opened = []

    def open_at(url):
        known = set(registered_aliases)
        backend = create_storage_backend(url)
        if backend.alias not in known:
            opened.append(backend)
        return backend

    with django_db_blocker.unblock():
        yield open_at
        for backend in opened:
            forget(backend.alias)


def as_user(url, user, password=""):
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{host}"))


def execute(url, *statements):
    """Execute statements on a server as its administrator."""
    if url.startswith("postgresql"):
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)
        return
    import MySQLdb

    parts = urlsplit(url)
    connection = MySQLdb.connect(
        host=parts.hostname,
        port=parts.port or 3306,
        user=parts.username,
        password=parts.password or "",
        database=parts.path.strip("/"),
    )
    for statement in statements:
        connection.cursor().execute(statement)
    connection.close()


@pytest.fixture
def user(request):
    """A user of a server, with a password, who may not do anything yet: the server's URL and it."""

    def make(url):
        name = f"u{uuid.uuid4().hex[:12]}"
        if url.startswith("postgresql"):
            execute(url, f"CREATE USER {name}")
            request.addfinalizer(lambda: execute(url, f"DROP OWNED BY {name}", f"DROP USER {name}"))
        else:
            execute(url, f"CREATE USER {name}@'%' IDENTIFIED BY 'right'")
            request.addfinalizer(lambda: execute(url, f"DROP USER {name}@'%'"))
        return name

    return make


def test_an_unknown_user_or_a_wrong_password(postgres_url, mysql_url, user, open_at):
    urls = [as_user(postgres_url, "nobody_at_all"), as_user(mysql_url, user(mysql_url), "wrong")]
    for url in urls:
        with pytest.raises(StorageUnavailableError, match="Check the user and the password"):
            open_at(url)


@pytest.mark.parametrize("server", [POSTGRES_URL, MYSQL_URL], ids=["postgres", "mysql"])
def test_a_database_that_is_not_there(server, postgres_url, mysql_url, open_at):
    with pytest.raises(StorageUnavailableError, match="Check its name, or create it"):
        open_at(with_database(server, "no_such_database"))


def test_a_user_who_may_not_write(postgres_url, mysql_url, user, open_at):
    for url in (postgres_url, mysql_url):
        name, database = user(url), urlsplit(url).path.strip("/")
        if url == postgres_url:
            grants = [f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}"]
        else:
            grants = [f"GRANT SELECT ON {database}.* TO {name}@'%'"]
        execute(url, *grants)
        store = open_at(as_user(url, name, "right"))
        assert store.runs.count_runs() >= 0
        with pytest.raises(StorageError, match="Grant the user SELECT, INSERT") as error:
            store.runs.add(new_run())
        assert not isinstance(error.value, StorageUnavailableError)


def test_a_server_that_takes_no_more_connections(postgres_url, mysql_url, user, open_at):
    limited = user(postgres_url)
    execute(postgres_url, f"ALTER USER {limited} CONNECTION LIMIT 0")
    with pytest.raises(StorageUnavailableError, match="All connections that it takes are taken"):
        open_at(as_user(postgres_url, limited))


@pytest.mark.parametrize(
    ("vendor", "limit", "message"),
    [
        ("postgres", "options=-c%20statement_timeout%3D200", "longer than the server allows"),
        ("postgres", "options=-c%20lock_timeout%3D200", "raise lock_timeout"),
        (
            "mysql",
            "init_command=SET%20SESSION%20innodb_lock_wait_timeout%3D1",
            "raise innodb_lock_wait_timeout",
        ),
    ],
)
def test_a_lock_that_is_held_for_too_long(request, vendor, limit, message, open_at, monkeypatch):
    monkeypatch.setattr("workflow_storage.backends.orm.errors.PATIENCE", 0.5)
    url = request.getfixturevalue(f"{vendor}_url")
    holder, store = open_at(url), open_at(f"{url}?{limit}")
    run = stored_run(holder)
    with django.db.transaction.atomic(using=holder.alias):
        holder.runs.heartbeat(run.id)
        with pytest.raises(StorageUnavailableError, match=message):
            store.runs.heartbeat(run.id)
    store.runs.heartbeat(run.id)


def test_a_statement_that_is_too_slow(mysql_url, open_at):
    store = open_at(mysql_url)
    is_mariadb = connections[store.alias].mysql_is_mariadb
    limit = "max_statement_time=0.001" if is_mariadb else "max_execution_time=1"
    limited = open_at(f"{mysql_url}?init_command={quote(f'SET SESSION {limit}')}")
    for number in range(6):
        stored_run(store, inputs="x" * 1_000_000, id=f"slow-{number}")
    with pytest.raises(StorageUnavailableError, match="longer than the server allows a statement"):
        for _ in range(50):
            limited.runs.list_runs()


def test_a_sqlite_file_that_may_not_grow(tmp_path, open_at):
    store = open_at(f"sqlite:///{tmp_path}/full.db")
    run = stored_run(store)
    with connections[store.alias].cursor() as cursor:
        cursor.execute("PRAGMA page_count")
        (pages,) = cursor.fetchone()
        cursor.execute(f"PRAGMA max_page_count = {pages}")

    with pytest.raises(StorageUnavailableError, match=r"full.*Make room on its disk"):
        store.states.save_state(run.id, {"x": "y" * 100_000}, "node")

    assert store.states.get_latest_state(run.id) is None


def test_files_that_are_no_database_or_cannot_be_opened(tmp_path, open_at):
    (tmp_path / "text.db").write_text("no database " * 1000)
    with pytest.raises(StorageError, match="restore the file from a backup"):
        open_at(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(StorageUnavailableError, match="Check that its folder is there"):
        open_at(f"sqlite:///{tmp_path}/no/folder/x.db")
    with sqlite3.connect(tmp_path / "damaged.db") as connection:
        connection.execute("CREATE TABLE x (y)")
    with (tmp_path / "damaged.db").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 500)
    with pytest.raises(StorageError, match=r"malformed.*restore the file from a backup"):
        open_at(f"sqlite:///{tmp_path}/damaged.db")


@pytest.mark.parametrize(
    ("vendor", "code", "advice"),
    [
        ("postgres", "53100", "Make room on its disk"),
        ("postgres", "57P03", "try again in a moment"),
        ("mysql", 1021, "Make room on its disk"),
        ("mysql", 1114, "Make room on its disk"),
        ("mysql", 1040, "All connections that it takes are taken"),
    ],
)
def test_what_no_test_can_bring_about_is_told_by_its_code(
    request, vendor, code, advice, django_db_blocker
):
    import psycopg

    with django_db_blocker.unblock():
        store = create_storage_backend(request.getfixturevalue(f"{vendor}_url"))
        if vendor == "postgres":
            error = django.db.OperationalError("it said so")
            error.__cause__ = (
                psycopg.errors.lookup(code)("") if code else psycopg.OperationalError()
            )
        else:
            error = django.db.OperationalError(code, "it said so")
        assert advice in str(storage_error(store.alias, error))
