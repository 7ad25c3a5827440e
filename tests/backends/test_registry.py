"""Stores that somebody else adds: registered by a call, or by the entry point of a package."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from django.core import checks

from workflow_storage import (
    StorageBackend,
    StorageConfig,
    StorageUnavailableError,
    UnsupportedBackendError,
    WorkflowRun,
    backends,
    create_storage_backend,
)
from workflow_storage.backends import register_backend
from workflow_storage.checks import check_configuration
from workflow_storage.factory import configured_alias
from workflow_storage.router import WorkflowStorageRouter


class OtherStore(StorageBackend):
    def check(self):
        return [checks.Warning("It is somebody else's.", id="other.W001")]


@pytest.fixture
def opened(sqlite_url, django_db_blocker, monkeypatch):
    """Register the scheme ``other``; gives the configurations that its function was called with."""
    configs = []

    def open_other(config):
        configs.append(config)
        runs, states = create_storage_backend(sqlite_url)
        return OtherStore(runs, states, name="other")

    monkeypatch.setattr(backends, "_registered", {})
    register_backend("other", open_other)
    with django_db_blocker.unblock():
        yield configs


def test_a_url_with_a_registered_scheme_opens_the_store_once(opened, tmp_path):
    url = f"other://{tmp_path.name}"
    backend = create_storage_backend(url)
    run = WorkflowRun(workflow_name="other")
    backend.runs.add(run)

    assert isinstance(backend, OtherStore)
    assert create_storage_backend(url) is backend
    assert backend.runs.get(run.id).workflow_name == "other"
    assert opened == [StorageConfig(backend=url)]
    runs, _states = backend
    assert runs is backend.runs
    backend.runs.delete(run.id)


def test_the_check_of_the_projects_own_store_is_asked(opened, settings):
    settings.WORKFLOW_STORAGE = "other://checked"

    assert [message.id for message in check_configuration(None)] == ["other.W001"]


def test_the_admin_and_the_router_leave_it_alone(opened, settings):
    settings.WORKFLOW_STORAGE = "other://routed"

    assert configured_alias() == "default"
    assert WorkflowStorageRouter().allow_migrate("default", "workflow_storage") is None
    assert WorkflowStorageRouter().db_for_read(WorkflowRun) == "default"


def test_an_error_of_the_store_is_what_the_caller_gets(monkeypatch, settings):
    def refuse(config):
        raise StorageUnavailableError("The other store sleeps. Wake it.")

    monkeypatch.setattr(backends, "_registered", {})
    register_backend("asleep", refuse)
    settings.WORKFLOW_STORAGE = "asleep://x"

    with pytest.raises(StorageUnavailableError, match="The other store sleeps"):
        create_storage_backend()
    (message,) = check_configuration(None)
    assert "The other store sleeps" in message.msg


def test_a_store_that_is_no_backend_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(backends, "_registered", {})
    register_backend("pair", lambda config: ("runs", "states"))

    with pytest.raises(TypeError, match=r"pair:// opened a tuple.*StorageBackend"):
        create_storage_backend("pair://x")


@pytest.mark.parametrize("scheme", ["", "1st", "with space", "mongo://", "ü"])
def test_what_is_no_scheme_is_refused(scheme):
    with pytest.raises(ValueError, match="is no scheme of a URL"):
        register_backend(scheme, create_storage_backend)


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "postgresql", "sqlite", "mysql"])
def test_our_own_schemes_cannot_be_taken(scheme):
    with pytest.raises(ValueError, match="is a store of workflow_storage already"):
        register_backend(scheme, create_storage_backend)


def test_an_unknown_scheme_is_answered_with_all_that_are_known(opened):
    with pytest.raises(UnsupportedBackendError, match="other://") as caught:
        create_storage_backend("mongo://host")

    for known in ("redis://", "rediss+cluster://", "postgresql://", "sqlite://"):
        assert known in str(caught.value)


PROJECT = """
    [build-system]
    requires = []
    build-backend = "build_wheel"
    backend-path = ["."]
    """
METADATA = "Metadata-Version: 2.1\nName: other-store\nVersion: 1.0\n"
ENTRY_POINTS = """
    [workflow_storage.backends]
    other = other_store:open_store
    broken = other_store:missing
    """
# A build backend (PEP 517) without dependencies, so that nothing is downloaded.
BUILD = """
    import zipfile

    def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
        name = "other_store-1.0-py3-none-any.whl"
        with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
            wheel.write("other_store.py")
            for file in ("METADATA", "WHEEL", "entry_points.txt", "RECORD"):
                wheel.write(file, f"other_store-1.0.dist-info/{file}")
        return name
    """
PACKAGE = """
    from django.core import checks
    from workflow_storage import StorageBackend, create_storage_backend

    class OtherStore(StorageBackend):
        def check(self):
            return [checks.Warning("It is in a file.", id="other_store.W001")]

    def open_store(config):
        path = config.backend.partition("://")[2]
        runs, states = create_storage_backend(f"sqlite:///{path}")
        return OtherStore(runs, states, name=f"other store in {path}")
    """


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build and install a small package with an entry point; gives the folder that it is in."""
    source = tmp_path_factory.mktemp("source")
    target = tmp_path_factory.mktemp("installed")
    for name, text in {
        "pyproject.toml": PROJECT,
        "build_wheel.py": BUILD,
        "other_store.py": PACKAGE,
        "METADATA": METADATA,
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": ENTRY_POINTS,
        "RECORD": "",
    }.items():
        (source / name).write_text(textwrap.dedent(text).lstrip())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, source], check=True, timeout=120)
    return target


def run_with(installed, code, tmp_path):
    environment = {name: value for name, value in os.environ.items() if "DJANGO" not in name}
    environment["PYTHONPATH"] = os.pathsep.join([str(installed), str(Path(__file__).parents[2])])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.splitlines()


def test_a_package_adds_a_store_with_an_entry_point(installed, tmp_path):
    code = """
        from workflow_storage import create_storage_backend, record_run, UnsupportedBackendError

        with record_run("by entry point", backend="other://runs.db") as run:
            run.save_state({"n": 1}, "node")
        backend = create_storage_backend("other://runs.db")
        print(type(backend).__name__, backend.name)
        print(backend.states.get_latest_state(run.run_id))
        for url in ("mongo://x", "broken://x"):
            try:
                create_storage_backend(url)
            except UnsupportedBackendError as exc:
                print("other://" in str(exc), "cannot be loaded" in str(exc))
        """

    assert run_with(installed, code, tmp_path) == [
        "OtherStore other store in runs.db",
        "{'n': 1}",
        "True False",
        "False True",
    ]
    assert (tmp_path / "runs.db").exists()


def test_manage_py_check_asks_a_store_with_an_entry_point(installed, tmp_path):
    code = """
        import django
        from django.conf import settings
        from django.core.management import call_command

        settings.configure(
            INSTALLED_APPS=["workflow_storage"], WORKFLOW_STORAGE="other://checked.db"
        )
        django.setup()
        call_command("check", stderr=__import__("sys").stdout)
        """

    assert any("other_store.W001" in line for line in run_with(installed, code, tmp_path))
