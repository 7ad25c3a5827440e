"""Each task a run, in the process that enqueues it: Django's ImmediateBackend, and transactions."""

import logging
import traceback
from dataclasses import replace
from importlib import import_module

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections, transaction
from django.test import override_settings

from tests.contrib.django_tasks import sample_tasks
from tests.settings import TASKS_LIBRARY
from workflow_storage import create_storage_backend, record_run, resume_run
from workflow_storage.contrib import tasks
from workflow_storage.contrib.django_tasks.receivers import connect_receivers
from workflow_storage.recorder.run import run_around

signals = import_module(f"{TASKS_LIBRARY}.signals")
in_project = pytest.mark.django_db(transaction=True)


@pytest.fixture
def backend(every_backend, every_url):
    """The store that tasks are recorded in, each in turn."""
    with override_settings(WORKFLOW_STORAGE_DJANGO_TASKS={"backend": every_url}):
        yield every_backend


@pytest.fixture
def own():
    """The project's own store."""
    return create_storage_backend()


@pytest.fixture
def other(memory_url):
    """A store that takes no part in the transactions of the project's database."""
    with override_settings(WORKFLOW_STORAGE_DJANGO_TASKS={"backend": memory_url}):
        yield create_storage_backend(memory_url)


def raising(*args, **kwargs):
    raise RuntimeError("a receiver of somebody else's")


class TestImmediately:
    def test_a_task_is_a_run_with_its_id_arguments_queue_and_priority(self, backend):
        result = sample_tasks.add.enqueue(2, b=3)

        run = backend.runs.get(result.id)
        assert (run.status, run.outputs, run.inputs) == ("completed", 5, {"a": 2, "b": 3})
        assert run.workflow_name == "tests.contrib.django_tasks.sample_tasks.add"
        assert run.labels == {"queue": "default", "priority": "0", "task_backend": "default"}
        assert (run.attempt, run.parent_id) == (1, None)
        assert run_around() is None

    def test_a_task_that_fails_is_a_failed_run_with_its_traceback(self, backend):
        result = sample_tasks.fail.enqueue("no pages")

        run = backend.runs.get(result.id)
        assert (result.status, run.status) == ("FAILED", "failed")
        assert run.error_message.startswith("ValueError: no pages\n\nTraceback")
        assert "sample_tasks.py" in run.error_message

    def test_checkpoints_usage_and_nodes_go_to_the_run_of_the_task(self, backend):
        result = sample_tasks.checkpointed.enqueue(["one", "two"])

        assert result.return_value == result.id
        run = backend.runs.get(result.id)
        assert (run.total_tokens, run.total_cost_usd) == (20, 0.2)
        assert [step["node_id"] for step in backend.states.iter_steps(run.id)] == ["one", "two"]

    @pytest.mark.parametrize("enqueue", ["enqueue", "aenqueue"])
    def test_an_async_task_has_its_run(self, backend, enqueue):
        call = getattr(sample_tasks.asynchronous, enqueue)
        result = async_to_sync(call)("p") if enqueue == "aenqueue" else call("p")

        assert result.return_value == result.id
        assert backend.states.get_latest_state(result.id) == {"page": "p"}
        assert backend.runs.get(result.id).status == "completed"


@in_project
class TestWhatIsStored:
    def test_the_context_of_a_task_is_no_input(self, own):
        result = sample_tasks.with_context.enqueue("try")

        assert result.return_value == "try 1"
        assert own.runs.get(result.id).inputs == {"word": "try"}

    def test_arguments_that_the_task_does_not_take_are_stored_as_they_are(self, own):
        result = sample_tasks.add.enqueue(1, 2, 3, c=4)

        run = own.runs.get(result.id)
        assert (run.status, run.inputs) == ("failed", {"args": [1, 2, 3], "kwargs": {"c": 4}})

    def test_a_task_in_a_task_has_it_as_parent(self, own):
        result = sample_tasks.outer.enqueue()

        assert own.runs.get(result.return_value).parent_id == result.id
        assert own.runs.get(result.id).parent_id is None

    def test_a_result_that_is_not_json_fails_the_run_as_it_fails_the_task(self, own):
        result = sample_tasks.not_json.enqueue()

        run = own.runs.get(result.id)
        assert (result.status, run.status) == ("FAILED", "failed")
        assert run.error_message.startswith("TypeError")

    def test_what_leaves_the_process_cancels_the_run(self, own):
        result = sample_tasks.leave.enqueue()

        assert own.runs.get(result.id).status == "cancelled"

    def test_a_task_that_is_suspended_is_a_run_that_waits_and_goes_on(self, own):
        result = sample_tasks.ask.enqueue()

        run = own.runs.get(result.id)
        assert (run.status, run.waiting_for) == ("pending", "approval by finance")
        with resume_run(result.id) as again:
            assert again.attempt == 2

    def test_a_task_of_a_backend_that_sends_its_signals_from_an_event_loop_is_recorded(self, own):
        result = sample_tasks.add_later.enqueue(1)

        async def work():
            await signals.task_started.asend(sender=None, task_result=result)
            begun = await own.runs.aget(result.id)
            object.__setattr__(result, "status", "SUCCESSFUL")
            object.__setattr__(result, "_return_value", 1)
            await signals.task_finished.asend(sender=None, task_result=result)
            return begun

        assert async_to_sync(work)().status == "running"
        run = own.runs.get(result.id)
        assert (run.status, run.outputs, run.attempt) == ("completed", 1, 1)
        assert tasks.recorded(result.id) is None

    @pytest.mark.parametrize(
        ("error", "status", "beginning"),
        [
            (ValueError("no pages\nat all"), "failed", "ValueError: no pages\nat all\n\nTraceback"),
            (ValueError(), "failed", "ValueError: \n\nTraceback"),
            (DatabaseError("gone"), "failed", "django.db.utils.DatabaseError: gone\n\nTraceback"),
            (SystemExit(3), "cancelled", "SystemExit: 3\n\nTraceback"),
        ],
    )
    def test_an_error_whose_text_alone_the_queue_has_reads_as_any_other(
        self, error, status, beginning, own
    ):
        result = sample_tasks.add_later.enqueue(1)
        try:
            raise error
        except BaseException as exc:
            path = f"{type(exc).__module__}.{type(exc).__qualname__}"
            told = "".join(traceback.format_exception(exc))
        task_error = import_module(f"{TASKS_LIBRARY}.base").TaskError
        result.errors.append(task_error(exception_class_path=path, traceback=told))
        object.__setattr__(result, "status", "FAILED")

        signals.task_started.send(sender=None, task_result=result)
        signals.task_finished.send(sender=None, task_result=result)

        run = own.runs.get(result.id)
        assert run.status == status
        assert run.error_message.startswith(beginning)
        assert run.error_message.count("Traceback") == 1


@in_project
class TestOptions:
    def test_a_task_that_says_no_is_not_recorded(self, own):
        assert sample_tasks.quiet.enqueue().return_value is True
        assert own.runs.list_runs() == []

    def test_a_task_says_what_its_runs_are_called_and_that_arguments_are_left_out(self, own):
        result = sample_tasks.named.enqueue("secret")

        run = own.runs.get(result.id)
        assert (run.workflow_name, run.inputs, run.outputs) == ("greeting", None, 6)

    @override_settings(WORKFLOW_STORAGE_DJANGO_TASKS={"record_all": False})
    def test_none_is_recorded_but_who_says_yes_where_the_project_says_so(self, own):
        sample_tasks.add.enqueue(1)
        result = sample_tasks.named.enqueue("secret")

        assert [run.id for run in own.runs.list_runs()] == [result.id]

    @pytest.mark.parametrize("value", [{"record": True}, {"heartbeat": 0}, "all"])
    def test_a_setting_that_cannot_be_used_is_an_error_when_the_project_starts(self, value):
        with (
            override_settings(WORKFLOW_STORAGE_DJANGO_TASKS=value),
            pytest.raises(ImproperlyConfigured, match="WORKFLOW_STORAGE_DJANGO_TASKS"),
        ):
            connect_receivers()


@in_project
class TestTransactions:
    """A task of a database waits in the transaction that it is enqueued in; so does its run."""

    def test_one_that_is_enqueued_is_pending(self, own):
        result = sample_tasks.add_later.enqueue(1, b=2)

        run = own.runs.get(result.id)
        assert (run.status, run.inputs) == ("pending", {"a": 1, "b": 2})
        assert run.labels == {"queue": "default", "priority": "7", "task_backend": "database"}

    @pytest.mark.parametrize("store", ["own", "other"])
    def test_a_rolled_back_enqueue_leaves_no_run(self, store, request):
        backend = request.getfixturevalue(store)
        with pytest.raises(OSError, match="no"), transaction.atomic():
            sample_tasks.add_later.enqueue(1)
            raise OSError("no")

        assert backend.runs.list_runs() == []

    @pytest.mark.parametrize("store", ["own", "other"])
    def test_one_that_is_committed_is_pending_with_the_run_around_as_parent(self, store, request):
        backend = request.getfixturevalue(store)
        with transaction.atomic():
            with record_run("view", backend=backend) as around:
                result = sample_tasks.add_later.enqueue(1)
            if store == "other":
                assert backend.runs.get(result.id) is None

        run = backend.runs.get(result.id)
        assert (run.status, run.parent_id) == ("pending", around.run_id)

    def test_one_of_async_code_is_pending(self, own):
        result = async_to_sync(sample_tasks.add_later.aenqueue)(1)

        assert own.runs.get(result.id).status == "pending"

    def test_a_task_that_is_carried_out_in_a_transaction_goes_back_with_it(self, own):
        with pytest.raises(OSError, match="no"), transaction.atomic():
            sample_tasks.add.enqueue(1)
            raise OSError("no")

        assert own.runs.list_runs() == []

    def test_a_task_of_no_database_waits_for_the_transaction_of_the_store(self, own):
        """Its worker may begin it before: it would wait for the row of the pending run."""
        waiting = replace(sample_tasks.add.enqueue(1), id="task-2", status="READY")

        with transaction.atomic():
            signals.task_enqueued.send(sender=None, task_result=waiting)
            assert own.runs.get("task-2") is None

        assert own.runs.get("task-2").status == "pending"

    def test_one_that_is_carried_out_in_a_transaction_is_added_once(self, own, monkeypatch):
        added = []
        add = type(own.runs).add
        monkeypatch.setattr(
            type(own.runs), "add", lambda runs, run: added.append(run.id) or add(runs, run)
        )
        with transaction.atomic():
            result = sample_tasks.add.enqueue(1)

        assert added == [result.id]
        assert own.runs.get(result.id).status == "completed"


@in_project
class TestWithoutAStore:
    """Nothing that goes wrong with the store reaches the task."""

    @pytest.fixture(params=["postgresql://nobody@127.0.0.1:1/none", "redis://127.0.0.1:1/0", "no"])
    def _broken(self, request):
        with override_settings(WORKFLOW_STORAGE_DJANGO_TASKS={"backend": request.param}):
            yield

    @pytest.mark.usefixtures("_broken")
    def test_tasks_are_enqueued_and_carried_out(self, caplog):
        assert sample_tasks.add.enqueue(1, b=1).return_value == 2
        assert sample_tasks.fail.enqueue("x").status == "FAILED"
        assert sample_tasks.add_later.enqueue(1).status == "READY"

        ours = [one for one in caplog.records if one.name == "workflow_storage.contrib.tasks"]
        assert len(ours) == 3 + 3 + 1
        assert all(one.levelno == logging.ERROR and one.exc_info for one in ours)

    def test_a_store_that_goes_away_in_the_middle_fails_no_task(self, own, caplog):
        try:
            result = sample_tasks.break_store.enqueue()
        finally:
            with connections[DEFAULT_DB_ALIAS].cursor() as cursor:
                cursor.execute("ALTER TABLE gone RENAME TO workflow_runs")

        assert result.return_value == "done"
        assert f"What became of task {result.id} was not stored" in caplog.text
        assert own.runs.get(result.id).status == "running"

    @override_settings(WORKFLOW_STORAGE_DJANGO_TASKS={"record": True})
    def test_a_setting_that_cannot_be_used_fails_no_task(self, caplog):
        assert sample_tasks.add.enqueue(1).return_value == 1
        assert "WORKFLOW_STORAGE_DJANGO_TASKS" in caplog.text

    def test_a_receiver_of_somebody_elses_that_raises_leaves_no_run_pending(self, own):
        """As the worker of a database does: it fails the task unrun, and says so."""
        sample_tasks.add_later.enqueue(1)
        result = own.runs.list_runs()[0]
        task_result = sample_tasks.add_later.get_backend().get_result(result.id)
        object.__setattr__(task_result, "status", "FAILED")
        try:
            raising()
        except RuntimeError:
            signals.task_finished.send(
                sender=type(sample_tasks.add_later.get_backend()), task_result=task_result
            )

        run = own.runs.get(result.id)
        assert (run.status, run.attempt) == ("failed", 0)
        assert run.error_message.startswith("RuntimeError: a receiver of somebody else's")
