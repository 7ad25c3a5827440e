"""What becomes of a run when a task is sent, or cannot be: on a broker from which nobody takes it."""

import logging

import pytest
from asgiref.sync import async_to_sync
from celery import chain, group
from django.core.signals import request_finished
from django.db import transaction
from kombu.exceptions import OperationalError

from tests.conftest import emptied
from tests.contrib.celery import project
from workflow_storage import WorkflowRun, create_storage_backend, record_run
from workflow_storage.contrib import tasks
from workflow_storage.contrib.celery import publishing, record_task

NOWHERE = "redis://127.0.0.1:1/0"

pytestmark = pytest.mark.usefixtures("broker")


def only_run(backend):
    (run,) = backend.runs.list_runs()
    return run


def not_sent(**options):
    connection = project.app.connection_for_write(NOWHERE, transport_options={"max_retries": 0})
    with pytest.raises(OperationalError), connection:
        project.add.apply_async((1,), connection=connection, **options)


class TestWaiting:
    def test_a_task_that_is_sent_is_a_run_that_waits(self, store):
        result = project.add.delay(1, y=2)

        run = only_run(store)
        assert (run.id, run.status, run.attempt) == (result.id, "pending", 0)
        assert run.workflow_name == "tests.contrib.celery.project.add"
        assert run.inputs == {"x": 1, "y": 2}
        assert run.labels == {"queue": "workflow_storage_test"}
        assert run.parent_id is None

    def test_its_parent_is_the_run_that_is_recorded_around(self, store):
        with record_run("view", backend=store) as around:
            result = project.add.delay(1)
        with record_run("view", backend="memory://celery"):
            other = project.add.delay(1)

        assert store.runs.get(result.id).parent_id == around.run_id
        assert store.runs.get(other.id).parent_id is None

    def test_so_it_is_in_async_code(self, store):
        async def view():
            async with record_run("view", backend=store) as around:
                not_sent(task_id="lost")
                return around.run_id, project.add.delay(1).id

        parent_id, sent = async_to_sync(view)()

        assert store.runs.get(sent).parent_id == parent_id
        assert [store.runs.get(run_id).status for run_id in (sent, "lost")] == ["pending", "failed"]

    def test_a_group_is_found_by_its_label(self, store):
        result = group(project.add.s(1), project.add.s(2)).apply_async(queue="other")

        found = store.runs.list_runs(labels={"group": result.id, "queue": "other"})
        assert {run.id for run in found} == {child.id for child in result.children}

    def test_of_a_chain_only_what_was_sent_waits(self, store):
        result = chain(project.add.s(1), project.add.s(2)).apply_async()

        assert only_run(store).id == result.parent.id

    def test_one_that_is_known_by_name_only_waits_too(self, store):
        project.app.send_task("elsewhere.task", (1,), {"y": 2}, shadow="a name for people")

        run = only_run(store)
        assert run.workflow_name == "a name for people"
        assert run.inputs == {"args": [1], "kwargs": {"y": 2}}

    @pytest.mark.parametrize("args", [(1, (2, 3)), [1, [2, 3]], [1, (2,)], ("x" * 3000, "(,)")])
    def test_its_arguments_are_stored_whether_they_are_a_list_or_not(self, store, args):
        project.add.apply_async(args)

        x, y = args
        assert only_run(store).inputs == {"x": x, "y": list(y) if isinstance(y, tuple) else y}

    def test_what_argsrepr_hides_is_not_stored(self, store):
        project.add.apply_async(("4111 1111",), argsrepr="('****',)")

        assert only_run(store).inputs == {"args": "('****',)", "kwargs": "{}"}

    def test_arguments_that_are_no_json_are_stored_as_text(self, store):
        project.add.apply_async(({1},), serializer="pickle")

        assert only_run(store).inputs == {"args": "({1},)", "kwargs": "{}"}

    def test_one_that_has_ended_waits_again_when_it_is_sent_again(self, store):
        result = project.add.delay(1)
        store.runs.update_status(result.id, "failed", error_message="bad")

        project.add.apply_async((1,), task_id=result.id)

        assert only_run(store).status == "pending"


class TestOptions:
    def test_a_task_is_left_out_by_itself(self, store):
        project.unrecorded.delay()

        assert store.runs.list_runs() == []

    def test_a_task_names_its_runs_and_keeps_its_arguments_to_itself(self, store):
        project.secret.delay("hush")

        run = only_run(store)
        assert (run.workflow_name, run.inputs) == ("secret work", None)

    def test_only_those_that_say_so_are_recorded(self, store, settings):
        settings.WORKFLOW_STORAGE_CELERY = {
            **settings.WORKFLOW_STORAGE_CELERY,
            "record_all": False,
        }
        project.add.delay(1)
        project.secret.delay("hush")

        assert only_run(store).workflow_name == "secret work"

    def test_the_decorator_refuses_what_is_a_task_already(self):
        def lazy():
            pass

        for task in (project.add, project.app.task(lazy)):
            with pytest.raises(TypeError, match="below @shared_task"):
                record_task(False)(task)

    @pytest.mark.parametrize("name", ["celery.chord_unlock", "celery.backend_cleanup"])
    def test_tasks_of_celery_itself_are_none_of_the_projects(self, store, name):
        project.app.send_task(name)

        assert store.runs.list_runs() == []


class TestNotSent:
    def test_the_next_task_tells_of_it(self, store):
        not_sent(task_id="lost")
        assert only_run(store).status == "pending"

        project.add.apply_async((1,), task_id="sent")

        lost, sent = (store.runs.get(run_id) for run_id in ("lost", "sent"))
        assert (lost.status, lost.error_message) == ("failed", publishing.NOT_SENT)
        assert sent.status == "pending"

    def test_or_the_end_of_the_request(self, store):
        not_sent(task_id="lost")

        request_finished.send(sender=None)

        assert only_run(store).status == "failed"

    def test_one_that_is_sent_after_all_waits(self, store):
        not_sent(task_id="again")
        project.add.apply_async((1,), task_id="again")
        project.add.delay(2)

        assert store.runs.get("again").status == "pending"


class TestTransactions:
    """On databases; a store of Redis knows of none."""

    @pytest.fixture(params=["sqlite", "postgres", "mysql"])
    def store(self, request, settings, django_db_blocker):
        url = request.getfixturevalue(f"{request.param}_url")
        settings.WORKFLOW_STORAGE_CELERY = {"backend": url}
        yield from emptied(url, django_db_blocker)

    def test_the_run_is_stored_once_it_is_committed(self, store):
        with transaction.atomic(using=store.alias):
            with record_run("view", backend=store) as around:
                result = project.add.delay(1)
            assert store.runs.get(result.id) is None

        assert store.runs.get(result.id).parent_id == around.run_id

    def test_nothing_is_stored_if_it_is_rolled_back(self, store):
        with pytest.raises(ZeroDivisionError), transaction.atomic(using=store.alias):
            project.add.delay(1)
            raise ZeroDivisionError

        assert store.runs.list_runs() == []

    def test_whoever_has_begun_it_before_keeps_it(self, store):
        with transaction.atomic(using=store.alias):
            result = project.add.delay(1)
            store.runs.add(WorkflowRun(id=result.id, workflow_name="w", status="running"))

        assert only_run(store).status == "running"

    def test_what_could_not_be_sent_is_not_stored(self, store):
        with transaction.atomic(using=store.alias):
            not_sent()

        assert store.runs.list_runs() == []

    def test_a_task_that_is_sent_on_commit_waits(self, store):
        with transaction.atomic(using=store.alias):
            transaction.on_commit(lambda: project.add.delay(1), using=store.alias)
            assert store.runs.list_runs() == []

        assert only_run(store).status == "pending"


def test_a_task_is_sent_although_the_store_does_not_answer(settings, caplog):
    settings.WORKFLOW_STORAGE_CELERY = {"backend": "redis://127.0.0.1:1/0"}

    result = project.add.delay(1)

    assert result.id
    (record,) = caplog.records
    assert "was not stored. The task goes on" in record.getMessage()


def test_a_log_handler_may_send_a_task_although_the_store_does_not_answer(settings):
    class SendsMail(logging.Handler):
        sent = 0

        def emit(self, record):
            self.sent += 1
            assert self.sent < 10, "it goes round in circles"
            project.add.delay(1)

    settings.WORKFLOW_STORAGE_CELERY = {"backend": "redis://127.0.0.1:1/0"}
    handler, logger = SendsMail(), logging.getLogger(tasks.__name__)
    logger.addHandler(handler)
    try:
        project.add.delay(1)
    finally:
        logger.removeHandler(handler)

    assert handler.sent == 1


def test_the_store_is_the_projects_own_without_a_setting(settings, sqlite_url, django_db_blocker):
    settings.WORKFLOW_STORAGE = sqlite_url
    with django_db_blocker.unblock():
        result = project.add.delay(1)

        assert create_storage_backend(sqlite_url).runs.get(result.id).status == "pending"
