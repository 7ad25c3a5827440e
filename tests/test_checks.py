"""What ``manage.py check`` says, and where the shipped router sends the runs."""

import pytest
from django.core import checks
from django.core.management import call_command
from django.db import connections

from tests.servers import RedisServers
from workflow_storage import ExecutionState, WorkflowRun, create_storage_backend
from workflow_storage.backends.orm.registration import SQLITE_OPTIONS
from workflow_storage.checks import check_configuration
from workflow_storage.factory import forget
from workflow_storage.router import WorkflowStorageRouter


@pytest.fixture
def databases(settings, monkeypatch):
    """Let a test say what DATABASES holds."""

    def use(**changed):
        monkeypatch.setattr(
            "workflow_storage.config.settings.DATABASES",
            {
                alias: {"ENGINE": f"django.db.backends.{engine}", "NAME": name, "OPTIONS": options}
                for alias, (engine, name, options) in changed.items()
            },
        )

    return use


def found():
    return [message.id for message in check_configuration(None)]


def test_the_check_is_registered():
    assert any(
        check.__name__ == "check_configuration" for check in checks.registry.registry.get_checks()
    )


def test_a_server_is_fine(databases):
    databases(default=("postgresql", "x", {}))
    assert found() == []


@pytest.mark.parametrize(
    "setting",
    ["reporting", "mongodb://me:hush@host/x", {"backend": "nowhere"}, {"bakend": "sqlite"}, 5],
)
def test_a_setting_that_names_no_backend_is_w001(databases, settings, setting):
    databases(default=("postgresql", "x", {}))
    settings.WORKFLOW_STORAGE = setting

    (message,) = check_configuration(None)

    assert message.id == "workflow_storage.W001"
    assert "hush" not in str(message)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transaction_mode": "IMMEDIATE"},
        {"transaction_mode": "DEFERRED", "init_command": "PRAGMA journal_mode=WAL"},
        {"init_command": "PRAGMA journal_mode=WAL"},
    ],
)
def test_sqlite_without_wal_or_immediate_is_w002(databases, options):
    databases(default=("sqlite3", "x.db", options))

    (message,) = check_configuration(None)

    assert message.id == "workflow_storage.W002"
    assert "transaction_mode" in message.hint


def test_sqlite_as_the_check_suggests_it_is_fine(databases):
    databases(default=("sqlite3", "x.db", SQLITE_OPTIONS))
    assert found() == []


@pytest.mark.parametrize(
    "options",
    [
        {"charset": "latin1"},
        {"charset": "utf8"},
        {"charset": "utf8mb3"},
        {"init_command": "SET NAMES 'latin1'"},
        {"init_command": "SET sql_mode='STRICT_TRANS_TABLES', character_set_client = utf8"},
    ],
    ids=str,
)
def test_a_character_set_without_emoji_is_e001(databases, options):
    databases(default=("mysql", "x", options))

    (message,) = check_configuration(None)

    assert message.id == "workflow_storage.E001"


@pytest.mark.parametrize(
    "options",
    [{}, {"charset": "utf8mb4"}, {"charset": "latin1", "init_command": "SET NAMES utf8mb4"}],
)
def test_utf8mb4_is_fine(databases, options):
    databases(default=("mysql", "x", options))
    assert found() == []


def test_only_the_database_of_the_runs_is_checked(databases, settings):
    databases(default=("sqlite3", "x.db", {}), reporting=("postgresql", "x", {}))
    settings.WORKFLOW_STORAGE = "reporting"
    assert found() == []


@pytest.fixture
def atomic_requests(databases, settings):
    """Let every view run in a transaction on the database of the runs."""

    def use(engine, options=None):
        databases(default=(engine, "x", options or {}))
        from workflow_storage.config import settings as patched

        patched.DATABASES["default"]["ATOMIC_REQUESTS"] = True

    return use


class TestAtomicRequests:
    def test_without_an_own_connection_is_w006(self, atomic_requests, settings):
        atomic_requests("postgresql")

        (message,) = check_configuration(None)

        assert message.id == "workflow_storage.W006"
        assert "'own_connection': True" in message.hint
        settings.WORKFLOW_STORAGE = {"backend": "default", "own_connection": True}
        assert found() == []

    def test_on_sqlite_the_check_advises_another_database(self, atomic_requests, settings):
        atomic_requests("sqlite3", SQLITE_OPTIONS)

        (message,) = check_configuration(None)

        assert message.id == "workflow_storage.W006"
        assert "another database" in message.hint
        settings.WORKFLOW_STORAGE = {"backend": "default", "own_connection": True}
        (message,) = check_configuration(None)
        assert message.id == "workflow_storage.W001"
        assert "another database" in message.msg

    def test_on_another_database_than_that_of_the_runs_is_fine(self, atomic_requests, settings):
        atomic_requests("postgresql")
        settings.WORKFLOW_STORAGE = "postgresql://me@host/x"
        assert found() == []


@pytest.mark.parametrize("name", [":memory:", "file:x?mode=memory&cache=shared"])
def test_memory_is_w003(databases, name):
    databases(default=("sqlite3", name, SQLITE_OPTIONS))
    assert found() == ["workflow_storage.W003"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("sqlite", []),
        ("sqlite:///x.db", []),
        ({"path": "x.db"}, []),
        ("sqlite://:memory:", ["workflow_storage.W003"]),
        ("postgresql://me:hush@host/x", []),
    ],
)
def test_a_url_is_checked_without_being_opened(databases, settings, setting, expected):
    databases(default=("postgresql", "x", {}))
    settings.WORKFLOW_STORAGE = setting
    assert found() == expected


@pytest.mark.parametrize("router", [[], ["workflow_storage.router.WorkflowStorageRouter"]])
def test_migrate_makes_the_tables_in_the_database_of_the_setting(
    router, settings, tmp_path, django_db_blocker
):
    from workflow_storage import create_storage_backend

    for alias in ("main", "reporting"):
        configured = connections.configure_settings(
            {
                "default": {},
                alias: {
                    "ENGINE": "django.db.backends.sqlite3",
                    "NAME": str(tmp_path / f"{alias}.db"),
                },
            }
        )
        connections.databases[alias] = configured[alias]
    settings.WORKFLOW_STORAGE = "reporting"
    settings.DATABASE_ROUTERS = router
    with django_db_blocker.unblock():
        try:
            for alias in ("main", "reporting"):
                call_command("migrate", "workflow_storage", database=alias, verbosity=0)
            tables = {
                alias: set(connections[alias].introspection.table_names())
                for alias in ("main", "reporting")
            }
            backend = create_storage_backend()
            run = WorkflowRun(workflow_name="x")
            backend.runs.add(run)

            assert {"workflow_runs", "execution_states"} <= tables["reporting"]
            assert ("workflow_runs" in tables["main"]) == (not router)
            assert WorkflowRun.objects.using("reporting").get() == run
            if router:
                assert WorkflowRun.objects.get() == run
                assert ExecutionState.objects.db == "reporting"
        finally:
            for alias in ("main", "reporting"):
                forget(alias)


class TestRedis:
    @pytest.fixture
    def server(self, tmp_path, settings):
        with RedisServers(tmp_path, 1) as servers:
            settings.WORKFLOW_STORAGE = f"redis://127.0.0.1:{servers.ports[0]}"
            yield servers.client(servers.ports[0])
            create_storage_backend().runs.store.close()

    def test_a_server_that_forgets_is_a_warning(self, server):
        (message,) = check_configuration(None)
        assert message.id == "workflow_storage.W004"
        assert "neither an append-only file nor snapshots" in message.msg

        server.config_set("save", "3600 1")
        assert check_configuration(None) == []
        server.config_set("save", "")
        server.config_set("appendonly", "yes")
        assert check_configuration(None) == []

    @pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
    def test_a_server_that_evicts_is_a_warning(self, server, policy):
        server.config_set("save", "3600 1")
        server.config_set("maxmemory-policy", policy)
        (message,) = check_configuration(None)
        assert message.id == "workflow_storage.W005"
        assert policy in message.msg

        server.config_set("maxmemory-policy", "volatile-lru")
        assert check_configuration(None) == []

    def test_every_node_of_a_cluster_is_asked(self, redis_cluster_url, settings):
        settings.WORKFLOW_STORAGE = redis_cluster_url
        (message,) = check_configuration(None)
        assert message.msg.count("127.0.0.1:") == 3

    def test_a_server_that_does_not_answer_or_tell_says_nothing(self, server, settings):
        server.execute_command("ACL", "SETUSER", "default", "-config")
        assert check_configuration(None) == []
        for url in ("redis://127.0.0.1:1", "redis+cluster://127.0.0.1:1"):
            settings.WORKFLOW_STORAGE = url
            assert check_configuration(None) == []

    def test_a_url_that_cannot_be_used_names_no_backend(self, settings):
        settings.WORKFLOW_STORAGE = "redis://host/0?unknown=1"
        (message,) = check_configuration(None)
        assert message.id == "workflow_storage.W001"

    def test_the_models_stay_in_the_projects_databases(self, server, db):
        router = WorkflowStorageRouter()
        assert router.db_for_read(WorkflowRun) == "default"
        assert router.allow_migrate("default", "workflow_storage") is None
        assert WorkflowRun.objects.count() == 0
