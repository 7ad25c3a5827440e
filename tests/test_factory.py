"""From configuration to repositories: names, URLs, paths, settings, plain scripts."""

import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from tests.servers import mysql_database, postgres_database
from workflow_storage import (
    GlobalConfig,
    StorageConfig,
    StorageError,
    StorageUnavailableError,
    UnsupportedBackendError,
    WorkflowRun,
    acreate_storage_backend,
    create_storage_backend,
    factory,
)
from workflow_storage.config import registered_aliases
from workflow_storage.factory import forget
from workflow_storage.testing import new_run, stored_run


@pytest.fixture(autouse=True)
def own_databases(django_db_blocker, monkeypatch, tmp_path):
    """Work in an empty folder, and take what a test registers out of Django again."""
    monkeypatch.chdir(tmp_path)
    known = set(registered_aliases)
    with django_db_blocker.unblock():
        yield
        for alias in registered_aliases - known:
            forget(alias)


def settings_of(backend):
    return connections[backend.runs.alias].settings_dict


def pragma(backend, name):
    with connections[backend.runs.alias].cursor() as cursor:
        return cursor.execute(f"PRAGMA {name}").fetchone()[0]


class TestNames:
    def test_a_name_in_databases_is_that_database(self):
        assert create_storage_backend("default").runs.alias == "default"
        assert create_storage_backend(StorageConfig(backend="default")).states.alias == "default"

    def test_both_repositories_unpack(self):
        runs, states = backend = create_storage_backend("default")
        assert (runs, states) == (backend.runs, backend.states)

    @pytest.mark.parametrize(
        "backend", ["mongodb://user:secret@host/x", "redshirt", "", "SQLITE", "postgresql"]
    )
    def test_anything_else_is_an_error_that_names_what_is_supported(self, backend):
        with pytest.raises(UnsupportedBackendError) as caught:
            create_storage_backend(backend)

        message = str(caught.value)
        for supported in ("'default'", "'sqlite'", "postgresql://", "mysql://", "sqlite://"):
            assert supported in message
        assert "secret" not in message
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize("config", [5, {"backend": "sqlite"}, GlobalConfig()])
    def test_a_configuration_of_another_type_is_a_type_error(self, config):
        with pytest.raises(TypeError, match="takes a StorageConfig, a string or None"):
            create_storage_backend(config)


class TestSQLite:
    def test_sqlite_is_the_file_at_path(self, tmp_path):
        backend = create_storage_backend(StorageConfig(backend="sqlite", path="x.db"))
        stored_run(backend)

        assert (tmp_path / "x.db").exists()
        assert backend.runs.count_runs() == 1

    def test_path_defaults_to_workflows_db(self, tmp_path):
        create_storage_backend("sqlite")
        assert (tmp_path / "workflows.db").exists()

    def test_a_relative_url_is_relative_to_the_working_directory(self, tmp_path, monkeypatch):
        first = create_storage_backend("sqlite:///some.db")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        second = create_storage_backend("sqlite:///some.db")

        stored_run(first)
        assert (tmp_path / "some.db").exists()
        assert (tmp_path / "elsewhere" / "some.db").exists()
        assert second.runs.count_runs() == 0

    def test_url_and_path_of_one_file_are_one_database(self, tmp_path):
        by_path = create_storage_backend(StorageConfig(path="same.db"))
        by_url = create_storage_backend(f"sqlite:///{tmp_path}/same.db")
        assert by_path.runs.alias == by_url.runs.alias

    def test_names_may_hold_spaces_and_other_letters(self, tmp_path):
        create_storage_backend(StorageConfig(path="ä ?%#.db"))
        assert (tmp_path / "ä ?%#.db").exists()

    def test_it_is_set_up_for_several_writers(self):
        backend = create_storage_backend("sqlite:///options.db?timeout=3")

        assert pragma(backend, "journal_mode") == "wal"
        assert pragma(backend, "synchronous") == 1
        assert pragma(backend, "busy_timeout") == 3000
        assert settings_of(backend)["OPTIONS"]["transaction_mode"] == "IMMEDIATE"

    def test_memory_is_shared_between_threads(self):
        backend = create_storage_backend("sqlite://:memory:")
        stored_run(backend)

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(backend.runs.count_runs).result() == 1

    def test_a_folder_that_is_not_there_is_unavailable(self):
        with pytest.raises(StorageUnavailableError, match="unable to open database file"):
            create_storage_backend("sqlite:///missing/folder/x.db")
        Path("missing/folder").mkdir(parents=True)
        assert create_storage_backend("sqlite:///missing/folder/x.db").runs.count_runs() == 0

    @pytest.mark.parametrize("url", ["sqlite://x.db", "sqlite:///", "sqlite://folder/x.db"])
    def test_a_url_that_names_no_file_says_how_to_write_one(self, url):
        with pytest.raises(UnsupportedBackendError, match="Write sqlite:///relative"):
            create_storage_backend(url)

    @pytest.mark.parametrize("options", ["timeout=abc", "foo=1", "transaction_mode=foo"])
    def test_options_that_the_database_does_not_take_are_an_error_of_ours(self, options):
        with pytest.raises(UnsupportedBackendError, match="cannot be opened with these options"):
            create_storage_backend(f"sqlite:///options.db?{options}")
        assert create_storage_backend("sqlite:///options.db").runs.count_runs() == 0

    def test_a_deleted_working_directory_is_no_matter_to_what_is_not_in_it(
        self, tmp_path, monkeypatch
    ):
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()

        absolute = create_storage_backend(f"sqlite:///{tmp_path}/absolute.db")
        assert create_storage_backend(f"sqlite:///{tmp_path}/absolute.db") is absolute
        assert create_storage_backend() is create_storage_backend("default")
        for relative in ("sqlite", "sqlite:///relative.db", StorageConfig(path="x/y.db")):
            with pytest.raises(UnsupportedBackendError, match="directory, which has been deleted"):
                create_storage_backend(relative)

        monkeypatch.chdir(tmp_path)
        assert create_storage_backend("sqlite:///relative.db").runs.count_runs() == 0

    def test_nothing_more_is_kept_for_each_working_directory(self, tmp_path, monkeypatch):
        stores = ["default", f"sqlite:///{tmp_path}/one.db", StorageConfig(path=f"{tmp_path}/2.db")]
        first = [create_storage_backend(store) for store in stores]
        kept = len(vars(factory)["_backends"])
        for number in range(5):
            (tmp_path / str(number)).mkdir()
            monkeypatch.chdir(tmp_path / str(number))
            assert [create_storage_backend(store) for store in stores] == first
        assert len(vars(factory)["_backends"]) == kept

    def test_path_may_be_a_path(self, tmp_path):
        create_storage_backend(StorageConfig(path=tmp_path / "p.db"))
        assert (tmp_path / "p.db").exists()


class TestServers:
    @pytest.mark.parametrize("database", [postgres_database, mysql_database])
    def test_a_url_gets_its_tables_on_first_use_and_keeps_its_runs(self, database):
        with database() as url:
            run = stored_run(create_storage_backend(url))
            forget(create_storage_backend(url).runs.alias)

            assert create_storage_backend(url).runs.get(run.id) is not None
            forget(create_storage_backend(url).runs.alias)

    @pytest.mark.slow
    @pytest.mark.parametrize("database", ["sqlite", postgres_database, mysql_database])
    def test_processes_that_start_at_once_on_a_new_database_all_work(self, database, tmp_path):
        script = (
            "import sys; from workflow_storage import create_storage_backend, WorkflowRun; "
            "sys.stdin.readline(); "
            "create_storage_backend(sys.argv[1]).runs.add(WorkflowRun(workflow_name='x'))"
        )

        def start_all(url):
            processes = [plain_python("-c", script, url, wait=False) for _ in range(5)]
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            for process in processes:
                _, err = process.communicate(timeout=60)
                assert process.returncode == 0, err
            backend = create_storage_backend(url)
            assert backend.runs.count_runs() == 5
            forget(backend.runs.alias)

        if database == "sqlite":
            for attempt in range(2):
                start_all(f"sqlite:///{tmp_path}/new-{attempt}.db")
        else:
            with database() as url:
                start_all(url)

    def test_a_server_that_is_down_is_unavailable_and_hides_the_password(self):
        url = "postgresql://me:hush%40hush@127.0.0.1:1/x"
        for _ in range(2):
            with pytest.raises(StorageUnavailableError) as caught:
                create_storage_backend(url)
            assert "hush" not in str(caught.value)

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://me:hush/hush@127.0.0.1/x",
            "postgresql://me:hush#hush@127.0.0.1:5432/x",
            "postgresql://me:hush@127.0.0.1:hush/x",
            "mysql://me:hush@[::1/x",
        ],
    )
    def test_a_url_that_cannot_be_read_says_so_and_hides_the_password(self, url):
        with pytest.raises((UnsupportedBackendError, StorageUnavailableError)) as caught:
            create_storage_backend(url)

        assert "hush" not in str(caught.value).replace(":hush/x", "")
        assert caught.value.__cause__ is None or "hush" not in str(caught.value.__cause__)

    @pytest.mark.parametrize("charset", ["utf8", "utf8mb3", "latin1", "LATIN1"])
    def test_a_character_set_without_emoji_is_refused_when_it_is_opened(self, charset):
        with mysql_database() as url, pytest.raises(UnsupportedBackendError, match=charset):
            create_storage_backend(f"{url}?charset={charset}")

    def test_the_wide_character_set_may_be_named(self):
        with mysql_database() as url:
            backend = create_storage_backend(f"{url}?charset=utf8mb4")
            run = stored_run(backend, inputs="\N{GRINNING FACE}", workflow_name="\N{GRINNING FACE}")
            assert backend.runs.get(run.id).inputs == "\N{GRINNING FACE}"
            forget(backend.alias)

    def test_a_password_is_in_no_log_line(self, caplog):
        caplog.set_level("DEBUG")
        with postgres_database() as url:
            user = url.replace("://postgres@", "://postgres:hush@")
            backend = create_storage_backend(user)
            stored_run(backend)
            forget(backend.runs.alias)

        assert caplog.text
        assert "hush" not in caplog.text
        assert "hush" not in repr(backend)


class TestSetting:
    def test_none_is_the_default_database(self):
        assert create_storage_backend().runs.alias == "default"

    def test_the_setting_is_a_string_or_a_dict_and_a_change_is_noticed(self, settings, tmp_path):
        settings.WORKFLOW_STORAGE = "sqlite:///a.db"
        assert settings_of(create_storage_backend())["NAME"] == str(tmp_path / "a.db")

        settings.WORKFLOW_STORAGE = {"backend": "sqlite", "path": "b.db"}
        assert settings_of(create_storage_backend())["NAME"] == str(tmp_path / "b.db")

        del settings.WORKFLOW_STORAGE
        assert create_storage_backend().runs.alias == "default"

    def test_a_resolved_backend_is_kept(self):
        assert create_storage_backend("sqlite") is create_storage_backend("sqlite")

    def test_the_app_must_be_installed(self, settings):
        settings.INSTALLED_APPS = ["django.contrib.contenttypes"]
        with pytest.raises(ImproperlyConfigured, match="Add 'workflow_storage' to INSTALLED_APPS"):
            create_storage_backend("sqlite:///not-installed.db")

    def test_a_router_that_forbids_the_tables_is_named(self, settings):
        settings.DATABASE_ROUTERS = [ForbiddingRouter()]
        with pytest.raises(StorageError, match="router in DATABASE_ROUTERS forbids"):
            create_storage_backend("sqlite:///forbidden.db")


class ForbiddingRouter:
    def allow_migrate(self, db, app_label, **hints):
        return app_label != "workflow_storage"

    def test_the_shipped_router_lets_a_database_given_by_url_have_its_tables(
        self, settings, tmp_path
    ):
        settings.DATABASE_ROUTERS = ["workflow_storage.router.WorkflowStorageRouter"]
        backend = create_storage_backend("sqlite:///routed.db")
        run = stored_run(backend)
        backend.states.save_state(run.id, {}, "node")

        read = backend.runs.get(run.id)
        assert read.states.get().run == read

    def test_inside_an_event_loop_the_async_twin_makes_the_tables(self):
        async def use():
            backend = await acreate_storage_backend("sqlite:///async.db")
            run = new_run()
            await backend.runs.aadd(run)
            return await backend.runs.aget(run.id)

        assert async_to_sync(use)().workflow_name == "contract"


class TestConfig:
    def test_both_connections_are_part_of_what_tells_a_store(self, sqlite_url):
        first, same, other = (
            create_storage_backend(StorageConfig(backend=sqlite_url, async_connections=number))
            for number in (4, 4, 2)
        )
        assert first is same is create_storage_backend(sqlite_url)
        assert other is not first
        assert other.alias == first.alias

    @pytest.mark.parametrize("number", [0, -1, "many"])
    def test_there_is_at_least_one_async_connection(self, number):
        with pytest.raises(ValueError, match="async_connections"):
            StorageConfig(async_connections=number)

    def test_a_global_config_builds_its_storage_config(self):
        config = GlobalConfig(storage={"backend": "sqlite", "path": "test.db"})
        assert config.storage.backend == "sqlite"
        assert config.storage.path == "test.db"
        assert GlobalConfig().storage is None

    def test_the_defaults_are_sqlite_at_workflows_db(self):
        assert StorageConfig().model_dump() == {
            "backend": "sqlite",
            "path": "./workflows.db",
            "own_connection": False,
            "async_connections": 4,
        }

    def test_it_is_frozen_and_refuses_unknown_fields(self):
        with pytest.raises(ValueError, match="frozen"):
            StorageConfig().backend = "x"
        with pytest.raises(ValueError, match="Extra inputs") as caught:
            StorageConfig(backend="postgresql://me:hush@host/x", pth="hush")
        assert "hush" not in str(caught.value)

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://me:hush@127.0.0.1:1/x",
            "postgresql://me:hush@hush@127.0.0.1:1/x",
            "postgresql://me:hush/hush@127.0.0.1:1/x",
            "mysql://127.0.0.1:1/x?password=hush",
            "mongodb://:hush@host",
            "mysql:me:hush@host/x",
            "postgresql//me:hush@h/x",
            "host=localhost password=hush",
            "jdbc:postgresql://host/x;password=hush",
            "postgresql://me:hu sh@hush@host/x",
            "postgresql://me:a@hush/hush@host/x",
        ],
    )
    def test_a_password_is_in_no_repr(self, url):
        config = GlobalConfig(storage=StorageConfig(backend=url))
        assert "hush" not in repr(config)
        assert "hush" not in str(config)
        assert "hush" not in f"{config.storage}"
        assert "hush" not in repr(GlobalConfig(storage=url))
        with pytest.raises((UnsupportedBackendError, StorageError)) as caught:
            create_storage_backend(url)
        assert "hush" not in str(caught.value)


def plain_python(*args, wait=True, **environment):
    """Run Python as a user without a Django project does."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name != "DJANGO_SETTINGS_MODULE" and not name.startswith("PYTEST")
    }
    process = subprocess.Popen(
        [sys.executable, *args],
        env={**env, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


class TestPlainScripts:
    def test_without_settings_it_makes_workflows_db(self, tmp_path):
        out = plain_python(
            "-c",
            "from workflow_storage import create_storage_backend; "
            "runs, states = create_storage_backend(); print(type(runs).__name__)",
        )

        assert out == "DjangoWorkflowRunRepository\n"
        import sqlite3

        tables = {
            name
            for (name,) in sqlite3.connect(tmp_path / "workflows.db").execute(
                "SELECT name FROM sqlite_master"
            )
        }
        assert {"workflow_runs", "execution_states"} <= tables

    def test_a_script_can_use_the_models_and_runs_twice(self):
        script = (
            "from workflow_storage import WorkflowRun, create_storage_backend\n"
            "runs, states = create_storage_backend()\n"
            "run = WorkflowRun(workflow_name='script')\n"
            "runs.add(run)\n"
            "states.save_state(run.id, {'a': 1}, 'node')\n"
            "print(runs.count_runs(), run.states.count(), runs.get(run.id).started_at.tzinfo)\n"
        )
        assert plain_python("-c", script) == "1 1 UTC\n"
        assert plain_python("-c", script) == "2 1 UTC\n"

    def test_a_script_with_settings_and_empty_databases_gets_sqlite(self, tmp_path):
        script = textwrap.dedent("""
            from django.conf import settings
            settings.configure(INSTALLED_APPS=["workflow_storage"], DATABASES={})
            from workflow_storage import create_storage_backend
            print(create_storage_backend().runs.count_runs())
        """)
        assert plain_python("-c", script) == "0\n"
        assert (tmp_path / "workflows.db").exists()

    def test_a_notebook_works_with_its_event_loop_running(self):
        script = textwrap.dedent("""
            import asyncio
            from workflow_storage import WorkflowRun, create_storage_backend
            async def cell():
                runs, states = create_storage_backend()
                run = WorkflowRun(workflow_name="notebook")
                runs.add(run)
                states.save_state(run.id, {}, "node")
                print(runs.count_runs(), await states.aget_latest_state(run.id))
            asyncio.run(cell())
        """)
        assert plain_python("-c", script) == "1 {}\n"

    def test_what_a_script_starts_does_not_inherit_that_event_loops_pass(self):
        script = textwrap.dedent("""
            import asyncio, os, subprocess, sys
            from workflow_storage import create_storage_backend
            backend = create_storage_backend()
            async def cell():
                ask = "import os; print('DJANGO_ALLOW_ASYNC_UNSAFE' in os.environ)"
                for env in (None, {**os.environ}):
                    subprocess.run([sys.executable, "-c", ask], check=True, env=env)
                print(backend.runs.count_runs())
            asyncio.run(cell())
        """)
        assert plain_python("-c", script) == "False\nFalse\n0\n"

    def test_importing_the_package_loads_no_django(self):
        out = plain_python(
            "-c",
            "import workflow_storage, sys; print('django' in sys.modules, 'pydantic' in sys.modules)",
        )
        assert out == "False False\n"

    def test_a_missing_driver_says_what_to_install(self):
        script = textwrap.dedent("""
            import sys
            sys.modules["MySQLdb"] = None
            from workflow_storage import create_storage_backend
            try:
                create_storage_backend("mysql://root@127.0.0.1/test")
            except Exception as exc:
                print(type(exc).__name__, exc)
        """)
        out = plain_python("-c", script)
        assert re.match(r"StorageError .*pip install 'django-workflow-storage\[mysql\]'", out)


def test_every_public_name_can_be_imported():
    import workflow_storage

    assert sorted(workflow_storage.__all__) == sorted(workflow_storage.MODULE_OF)
    for name in workflow_storage.__all__:
        assert getattr(workflow_storage, name) is not None
    assert set(workflow_storage.__all__) <= set(dir(workflow_storage))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = workflow_storage.nothing


def test_an_abstract_or_incomplete_repository_cannot_be_made():
    from workflow_storage import AbstractExecutionStateRepository, AbstractWorkflowRunRepository

    class Incomplete(AbstractWorkflowRunRepository):
        def add(self, run):
            """Everything else is missing."""

    for abstract in (AbstractExecutionStateRepository, AbstractWorkflowRunRepository, Incomplete):
        with pytest.raises(TypeError, match="abstract"):
            abstract()


def test_the_whole_contract_has_async_twins():
    from workflow_storage import AbstractExecutionStateRepository, AbstractWorkflowRunRepository

    for repository in (AbstractExecutionStateRepository, AbstractWorkflowRunRepository):
        names = {name for name in vars(repository) if not name.startswith("_")} - {
            "writer",
            "in_transaction",
            "on_commit",
            "in_thread",
        }
        twins = {name for name in names if name[0] == "a" and name[1:] in names}
        assert {f"a{name}" for name in names - twins} == twins


def test_a_new_run_has_an_id_before_it_is_stored():
    assert isinstance(new_run().id, str)
    assert WorkflowRun(workflow_name="x").pk


def test_a_url_with_options_is_another_database_than_the_one_without(tmp_path, django_db_blocker):
    url = f"sqlite:///{tmp_path}/options.db"
    with django_db_blocker.unblock():
        with_options = create_storage_backend(f"{url}?timeout=7")
        plain = create_storage_backend(url)
        again = create_storage_backend(f"{url}#again")

        assert plain.alias != with_options.alias
        assert again.alias == plain.alias
        for alias in {plain.alias, with_options.alias}:
            forget(alias)
