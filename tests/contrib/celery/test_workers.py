"""Real workers, and what becomes of runs when they retry, take too long, or are killed in the middle."""

import json
import os
import signal
import time
from datetime import timedelta

import pytest
from celery import chain
from django.db import connections, transaction

from tests.contrib.celery import project
from tests.contrib.celery.workers import celery_worker
from tests.servers import wait_until
from workflow_storage import create_storage_backend, record_run

pytestmark = pytest.mark.slow


def attempts(backend, run_id):
    return [(one.number, one.status) for one in backend.runs.list_attempts(run_id)]


def status_of(backend, run_id):
    run = backend.runs.get(run_id)
    return run and run.status


def ended(backend, result, seconds=30):
    """Return the run of a task once it has ended."""
    terminal = {"completed", "failed", "cancelled"}
    wait_until(lambda: status_of(backend, result.id) in terminal, seconds)
    return backend.runs.get(result.id)


@pytest.fixture
def store(prefork, postgres_store):
    yield postgres_store
    # What fails here is logged, and would be seen nowhere else.
    assert "was not stored. The task goes on" not in prefork.said
    assert "Signal handler" not in prefork.said


class TestPrefork:
    def test_a_task_is_a_run(self, store):
        result = project.steps.delay(3)

        run = ended(store, result)
        assert (run.status, run.outputs) == ("completed", {"attempt": 1, "step": 2})
        assert run.worker.rpartition(":")[2] != str(os.getpid())
        assert (run.total_tokens, store.states.get_latest_state(run.id)) == (3, {"n": 2})

    def test_its_duration_is_without_the_wait_in_the_queue(self, store):
        run = ended(store, project.add.apply_async((1,), countdown=1))

        assert run.attempt_started_at - run.started_at > timedelta(seconds=0.9)
        assert run.duration_seconds < 0.9

    @pytest.mark.parametrize("countdown", [0, 0.3])
    def test_retries_are_attempts_of_one_run(self, store, countdown):
        run = ended(store, project.try_again.delay(3, countdown))

        assert (run.status, run.outputs, run.error_message) == ("completed", 4, None)
        statuses = [(1, "failed"), (2, "failed"), (3, "failed"), (4, "completed")]
        assert attempts(store, run.id) == statuses
        for number, attempt in enumerate(store.runs.list_attempts(run.id)[:3]):
            assert attempt.error_message.startswith(f"OSError: no route {number}")

    def test_the_last_retry_fails_the_run(self, store):
        run = ended(store, project.never.delay())
        wait_until(lambda: len(attempts(store, run.id)) == 2)
        wait_until(lambda: status_of(store, run.id) == "failed")

        assert attempts(store, run.id) == [(1, "failed"), (2, "failed")]

    @pytest.mark.parametrize(("by", "outputs"), [("task", 6), ("chain", 16), ("group", [6, 7])])
    def test_what_replaces_a_task_goes_on_with_its_run(self, store, by, outputs):
        run = ended(store, project.replaced.delay(5, by))

        assert (run.workflow_name, run.outputs) == (project.replaced.name, outputs)
        assert attempts(store, run.id) == [(1, "pending"), (2, "completed")]

    def test_of_a_chain_each_has_the_one_before_as_parent(self, store):
        result = chain(project.add.s(1, 1), project.add.s(10), project.add.s(100)).apply_async()
        first = result.parent.parent.id

        last = ended(store, result)
        assert last.outputs == 112
        assert last.parent_id == result.parent.id
        assert store.runs.get(result.parent.id).parent_id == first
        assert last.labels["root"] == first
        assert "root" not in store.runs.get(first).labels

    def test_of_a_chord_the_header_comes_from_the_task_and_the_body_from_the_header(self, store):
        around = ended(store, project.mapped.delay([1, 2, 3]))

        def total():
            (found,) = store.runs.list_runs(
                labels={"root": around.id}, workflow_name=project.total.name
            ) or [None]
            return found and found.status == "completed" and found

        wait_until(total)
        header = store.runs.list_runs(labels={"root": around.id}, workflow_name=project.add.name)
        assert {run.parent_id for run in header} == {around.id}
        assert total().parent_id in {run.id for run in header}
        assert len({run.labels["group"] for run in header}) == 1
        assert (len(header), total().outputs) == (3, 6)

    def test_a_recording_in_a_task_is_the_parent_of_what_it_sends(self, store):
        outer = ended(store, project.nested.delay())

        (inside,) = store.runs.list_runs(parent_id=outer.id)
        wait_until(lambda: status_of(store, outer.outputs) == "completed")
        assert store.runs.get(outer.outputs).parent_id == inside.id

    def test_what_a_task_sends_that_is_not_recorded_has_no_parent(self, store):
        sent = project.unrecorded.delay().get(timeout=30)

        wait_until(lambda: status_of(store, sent) == "completed")
        assert store.runs.get(sent).parent_id is None

    def test_a_task_whose_result_is_ignored_is_a_run_without_it(self, store):
        run = ended(store, project.ignored.delay(5))

        assert (run.status, run.outputs, run.inputs) == ("completed", None, {"x": 5})

    def test_one_that_rejects_its_message_is_tried_again(self, store):
        run = ended(store, project.reject.delay(requeue=True))

        assert (run.status, run.outputs) == ("completed", 2)
        assert attempts(store, run.id) == [(1, "failed"), (2, "completed")]

    def test_one_that_throws_its_message_away_has_failed(self, store):
        run = ended(store, project.reject.delay())

        assert run.status == "failed"
        assert "not now" in run.error_message

    def test_one_that_is_suspended_goes_on_when_it_is_sent_again(self, store):
        result = project.approve.delay(900)
        wait_until(lambda: store.runs.get(result.id).waiting_for == "approval by finance")

        project.approve.apply_async((900,), task_id=result.id)

        run = ended(store, result)
        assert (run.outputs, attempts(store, run.id)) == (900, [(1, "pending"), (2, "completed")])


class TestTransactions:
    def test_a_task_whose_sender_rolls_back_is_a_run_that_begins_with_it(self, store):
        with pytest.raises(ZeroDivisionError), transaction.atomic(using=store.alias):
            result = project.add.delay((1, (2,)), y=())
            raise ZeroDivisionError

        run = ended(store, result)
        assert (run.status, run.inputs) == ("completed", {"x": [1, [2]], "y": []})
        assert run.outputs == [1, [2]]
        assert run.labels == {"queue": project.QUEUE}

    def test_no_worker_waits_for_the_end_of_the_senders_transaction(self, store):
        with transaction.atomic(using=store.alias):
            with record_run("view", backend=store):
                result = project.add.delay(1, 2)
            assert result.get(timeout=20) == 3
            wait_until(lambda: status_of(store, result.id) == "completed")
            begun = store.runs.get(result.id)

        run = store.runs.get(result.id)
        assert (run.status, run.attempt, run.started_at) == ("completed", 1, begun.started_at)

    def test_a_task_that_is_tried_again_in_a_transaction_is_one_run(self, store):
        run = ended(store, project.try_again_in_a_transaction.delay())

        assert run.outputs == 1
        assert attempts(store, run.id) == [(1, "failed"), (2, "completed")]


class TestMainProcess:
    """What the main process of the worker tells of those that cannot."""

    def test_a_soft_time_limit_fails_the_run_where_it_was(self, store):
        run = ended(store, project.exceeds_softly.delay())

        assert (run.status, run.current_node) == ("failed", "waiting")
        assert "SoftTimeLimitExceeded" in run.error_message.splitlines()[0]
        assert "time.sleep(30)" in run.error_message

    def test_a_hard_time_limit_fails_the_run(self, store):
        run = ended(store, project.exceeds.delay())

        assert run.status == "failed"
        assert "TimeLimitExceeded" in run.error_message.splitlines()[0]
        assert 0.5 < run.duration_seconds < 5

    def test_a_process_that_is_killed_fails_the_run(self, store):
        run = ended(store, project.kill_itself.delay())

        assert run.status == "failed"
        assert "WorkerLostError" in run.error_message.splitlines()[0]
        assert "SIGKILL" in run.error_message

    def test_a_task_that_comes_again_is_the_next_attempt(self, store):
        run = ended(store, project.kill_itself_once.delay())

        assert (run.status, run.outputs) == ("completed", 2)
        assert attempts(store, run.id) == [(1, "failed"), (2, "completed")]
        assert store.states.get_latest_state(run.id) == {"n": 1}

    def test_a_task_that_exits_has_failed_where_it_did(self, store):
        run = ended(store, project.exit_process.delay())

        assert run.status == "failed"
        assert "SystemExit(3)" in run.error_message.splitlines()[0]
        assert "in exit_process" in run.error_message

    def test_one_that_is_revoked_before_it_begins_is_cancelled(self, store):
        result = project.add.apply_async((1,), countdown=1)
        project.app.control.revoke(result.id)

        run = ended(store, result)
        assert (run.status, run.attempt) == ("cancelled", 0)
        assert run.error_message == "Revoked before it began."

    @pytest.mark.parametrize("sent", ["SIGTERM", "SIGKILL"])
    def test_one_that_is_revoked_while_it_runs_is_cancelled(self, store, tmp_path, sent):
        result = project.wait_for.delay(str(tmp_path / "task"))
        wait_until((tmp_path / "task.1").exists)

        project.app.control.revoke(result.id, terminate=True, signal=sent)

        run = ended(store, result)
        assert run.status == "cancelled"
        assert run.error_message == f"Revoked and terminated by {sent}."
        time.sleep(0.5)
        assert status_of(store, result.id) == "cancelled"

    def test_one_that_has_expired_is_cancelled(self, store):
        run = ended(store, project.add.apply_async((1,), expires=0.01, countdown=0.5))

        assert run.status == "cancelled"
        assert run.error_message.startswith("Expired at 20")

    def test_one_that_the_worker_does_not_know_has_failed(self, store):
        run = ended(store, project.app.send_task("no.such.task"))

        assert (run.status, run.attempt) == ("failed", 0)
        assert run.error_message == "The worker knows no task no.such.task."

    def test_each_process_has_a_connection_of_its_own(self, store, prefork):
        # The main process has used one of its own by now.
        ended(store, project.kill_itself.delay())
        told = set()

        def has_heard_two():
            # At a time, for one process may be asked again and again while the other is idle.
            results = [project.who_is_connected.delay() for _ in range(4)]
            told.update(tuple(json.loads(ended(store, result).outputs)) for result in results)
            return len({process for process, _ in told}) > 1

        wait_until(has_heard_two)
        with connections[store.alias].cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            mine = cursor.fetchone()[0]
        of_process = {}
        for process, connection in told:
            of_process.setdefault(process, set()).add(connection)
        first, second, *_ = of_process.values()
        assert not first & second
        assert mine not in first | second


class TestRedelivery:
    def test_whoever_runs_a_task_that_comes_again_has_its_run_and_the_other_changes_nothing(
        self, store, prefork, tmp_path
    ):
        path = str(tmp_path / "task")
        result = project.wait_for.delay(path)
        wait_until((tmp_path / "task.1").exists)
        project.wait_for.apply_async((path,), task_id=result.id)  # as after a visibility timeout
        wait_until((tmp_path / "task.2").exists)
        (tmp_path / "task.go").touch()

        run = ended(store, result)
        wait_until(lambda: f"{result.id}] raised unexpected: RunLostError" in prefork.said)
        assert (run.outputs, store.runs.get(run.id).outputs) == (2, 2)
        assert attempts(store, run.id) == [(1, "failed"), (2, "completed")]
        history = [(one["attempt"], one["node_id"]) for one in store.states.iter_steps(run.id)]
        assert history == [(1, "waiting"), (2, "waiting"), (2, "went")]

    def test_its_owner_keeps_it_when_the_process_is_killed_that_had_it_before(
        self, store, tmp_path
    ):
        path = str(tmp_path / "task")
        result = project.wait_for.delay(path)
        wait_until((tmp_path / "task.1").exists)
        project.wait_for.apply_async((path,), task_id=result.id)
        wait_until((tmp_path / "task.2").exists)
        wait_until((tmp_path / "task.1").read_text)
        os.kill(int((tmp_path / "task.1").read_text()), signal.SIGKILL)
        wait_until(lambda: result.state == "FAILURE")  # as Celery has it, by its id alone

        time.sleep(0.5)
        assert status_of(store, result.id) == "running"
        (tmp_path / "task.go").touch()
        assert ended(store, result).outputs == 2


@pytest.mark.parametrize(
    ("pool", "url"),
    [
        (("--pool", "solo"), "sqlite_url"),
        (("--pool", "threads", "--concurrency", "2"), "mysql_url"),
        (("--pool", "prefork", "--concurrency", "1"), "redis_url"),
    ],
    ids=["solo on SQLite", "threads on MariaDB", "prefork on Redis"],
)
def test_other_pools_and_stores(request, broker, folder, settings, django_db_blocker, pool, url):
    url = request.getfixturevalue(url)
    settings.WORKFLOW_STORAGE_CELERY = {"backend": url}
    queue = f"{project.QUEUE}_{pool[1]}"
    with (
        django_db_blocker.unblock(),
        celery_worker(folder, url, *pool, prefix=broker, queue=queue) as worker,
    ):
        backend = create_storage_backend(url)
        steps, failed, again, replaced, approve = (
            task.apply_async(args, queue=queue)
            for task, args in (
                (project.steps, (2,)),
                (project.fail, ("bad",)),
                (project.try_again, (2,)),
                (project.replaced, (5,)),
                (project.approve, (900,)),
            )
        )
        assert ended(backend, steps).outputs == {"attempt": 1, "step": 1}
        assert ended(backend, failed).error_message.startswith("ValueError: bad")
        assert ended(backend, again).outputs == 3
        assert attempts(backend, again.id) == [(1, "failed"), (2, "failed"), (3, "completed")]
        assert ended(backend, replaced).outputs == 6
        wait_until(lambda: backend.runs.get(approve.id).waiting_for)
        assert "was not stored" not in worker.said


def test_a_worker_goes_on_without_its_store(broker, folder):
    options = ("--pool", "prefork", "--concurrency", "1")
    nowhere, queue = "postgresql://127.0.0.1:1/none", f"{project.QUEUE}_nowhere"
    with celery_worker(folder, nowhere, *options, prefix=broker, queue=queue) as worker:
        assert project.add.apply_async((1, 2), queue=queue).get(timeout=30) == 3
        failing = project.fail.apply_async(("bad",), queue=queue)
        with pytest.raises(ValueError, match="bad"):
            failing.get(timeout=30)
        assert project.add.apply_async((1, 2), queue=queue).get(timeout=30) == 3
        assert worker.said.count("was not stored. The task goes on") >= 3


class TestEndOfTheWorker:
    @pytest.fixture
    def start(self, broker, folder, settings, django_db_blocker, redis_url):
        settings.WORKFLOW_STORAGE_CELERY = {"backend": redis_url}
        queue = f"{project.QUEUE}_ending"
        options = ("--pool", "prefork", "--concurrency", "1")

        def start():
            return celery_worker(
                folder, redis_url, *options, prefix=broker, queue=queue, heartbeat=0.1
            )

        def begun(task, path):
            result = task.apply_async((str(path),), queue=queue)
            wait_until(lambda: status_of(backend, result.id) == "running")
            return result

        backend = create_storage_backend(redis_url)
        start.begun, start.backend = begun, backend
        return start

    def test_a_cold_shutdown_fails_what_is_lost_with_it(self, start, tmp_path):
        with start() as worker:
            result = start.begun(project.wait_at_most, tmp_path / "task")
            worker.process.send_signal(signal.SIGQUIT)

            run = ended(start.backend, result)
        assert run.status == "failed"
        assert run.error_message.startswith("The worker was shut down")

    def test_one_that_is_killed_is_found_by_its_heartbeats(self, start, tmp_path):
        with start() as worker:
            result = start.begun(project.wait_at_most, tmp_path / "task")
            begun = start.backend.runs.get(result.id)
            wait_until(lambda: start.backend.runs.get(result.id).heartbeat_at > begun.heartbeat_at)
            assert start.backend.runs.fail_stalled(timedelta(seconds=2)) == 0
            worker.kill()
        assert status_of(start.backend, result.id) == "running"

        wait_until(lambda: start.backend.runs.fail_stalled(timedelta(seconds=1)))

        assert "Stalled: no sign of life" in start.backend.runs.get(result.id).error_message


class TestRabbitMQ:
    def test_a_task_of_a_worker_that_is_killed_goes_on_in_another(
        self, broker, rabbitmq_url, folder, postgres_url, postgres_store, tmp_path
    ):
        options = ("--pool", "prefork", "--concurrency", "1")

        def worker():
            return celery_worker(folder, postgres_url, *options, prefix=broker, broker=rabbitmq_url)

        path = str(tmp_path / "task")
        with project.app.connection_for_write(rabbitmq_url, transport_options={}) as connection:
            result = project.wait_for.apply_async((path,), connection=connection)
        assert status_of(postgres_store, result.id) == "pending"
        with worker() as first:
            wait_until((tmp_path / "task.1").exists)
            first.kill()
        assert status_of(postgres_store, result.id) == "running"
        with worker() as second:
            wait_until((tmp_path / "task.2").exists)
            (tmp_path / "task.go").touch()

            run = ended(postgres_store, result)
            assert "was not stored" not in second.said
        assert run.outputs == 2
        assert attempts(postgres_store, run.id) == [(1, "failed"), (2, "completed")]
        one, two = (attempt.worker for attempt in postgres_store.runs.list_attempts(run.id))
        assert one != two

    def test_a_worker_that_was_stopped_and_given_up_changes_nothing_when_it_wakes(
        self, broker, rabbitmq_url, folder, postgres_url, postgres_store, tmp_path
    ):
        path = str(tmp_path / "task")
        options = ("--pool", "prefork", "--concurrency", "1", "--heartbeat-interval", "1")

        def worker():
            return celery_worker(
                folder, postgres_url, *options, prefix=broker, broker=f"{rabbitmq_url}?heartbeat=2"
            )

        with project.app.connection_for_write(rabbitmq_url, transport_options={}) as connection:
            result = project.wait_for.apply_async((path,), connection=connection)
        with worker() as first:
            wait_until((tmp_path / "task.1").exists)
            stopped = [first.process.pid, *first.children]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            try:
                with worker():
                    wait_until((tmp_path / "task.2").exists, 60)
                    (tmp_path / "task.go").touch()
                    run = ended(postgres_store, result)
            finally:
                for pid in stopped:
                    os.kill(pid, signal.SIGCONT)
            wait_until(lambda: "RunLostError" in first.said)

        assert (run.outputs, postgres_store.runs.get(run.id).outputs) == (2, 2)
        assert attempts(postgres_store, run.id) == [(1, "failed"), (2, "completed")]
