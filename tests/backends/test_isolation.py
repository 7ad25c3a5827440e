"""Transactions with one snapshot for all their statements: REPEATABLE READ and SERIALIZABLE."""

import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from urllib.parse import quote

import pytest
from django.db import connections, transaction
from django.db.models.signals import pre_delete
from django.utils import timezone

from tests.conftest import empty
from workflow_storage import (
    RunAlreadyExistsError,
    RunNotFoundError,
    SnapshotError,
    StatusConflictError,
    StorageError,
    StorageUnavailableError,
    WorkflowRun,
    create_storage_backend,
)
from workflow_storage.factory import forget
from workflow_storage.models import WorkflowRunLabel
from workflow_storage.testing import (
    ConcurrencyContract,
    changed_state,
    in_threads,
    new_run,
    read_run,
)
from workflow_storage.testing import stored_run as add_run

LEVELS = ["read committed", "repeatable read", "serializable"]
SECONDS = 4
LARGE = "x" * 10_000


@contextmanager
def opened(url):
    backend = create_storage_backend(url)
    empty(backend)
    try:
        yield backend
        empty(backend)
    finally:
        forget(backend.runs.alias)


def with_level(vendor, url, level):
    """Return the URL of a database where a transaction has a level unless it says otherwise."""
    if vendor == "postgres":
        setting = f"-c default_transaction_isolation={level.replace(' ', chr(92) + ' ')}"
        return f"{url}?options={quote(setting)}"
    return f"{url}?isolation_level={quote(level)}"


@pytest.fixture(params=[(vendor, level) for vendor in ("postgres", "mysql") for level in LEVELS])
def backend(request, django_db_blocker):
    """A store on each database that has such levels, at each of them in turn."""
    vendor, level = request.param
    url = request.getfixturevalue(f"{vendor}_url")
    with django_db_blocker.unblock(), opened(with_level(vendor, url, level)) as backend:
        backend.level = level
        yield backend


def is_postgresql(backend):
    return connections[backend.runs.alias].vendor == "postgresql"


def test_the_level_is_what_the_test_says(backend):
    connection = connections[backend.runs.alias]
    is_mariadb = getattr(connection, "mysql_is_mariadb", False)
    name = "tx_isolation" if is_mariadb else "transaction_isolation"
    with connection.cursor() as cursor:
        cursor.execute(
            "SHOW transaction_isolation" if is_postgresql(backend) else f"SELECT @@{name}"
        )
        (level,) = cursor.fetchone()

    assert level.replace("-", " ").lower() == backend.level


def test_concurrent_states_are_all_kept(backend):
    ConcurrencyContract().test_concurrent_states_of_one_run_from_threads_are_all_kept(backend)


@pytest.mark.slow
def test_deleting_states_beside_writers_damages_none(backend):
    run = add_run(backend)
    end = time.monotonic() + SECONDS

    def write(number):
        writer, state, saved = backend.states.writer(run.id), {}, 0
        while time.monotonic() < end:
            state = changed_state(state, "grow", 2000 + number)
            writer.save_state(state, f"writer {number}")
            saved += 1
        return saved

    def delete(_):
        deleted = 0
        while time.monotonic() < end:
            deleted += backend.states.delete_states(run.id, keep_last=3)
            time.sleep(0.01)  # or the writers would wait for locks most of the time
        return deleted

    def read(_):
        reads = 0
        while time.monotonic() < end:
            backend.states.get_latest_state(run.id)
            reads += len(backend.states.get_state_history(run.id))
            time.sleep(0.01)
        return reads

    work = [write, write, write, delete, delete, read]
    *saved, deleted, deleted_too, reads = in_threads(len(work), lambda n: work[n](n))

    steps = [checkpoint["step"] for checkpoint in backend.states.get_state_history(run.id)]
    assert all(saved)
    assert reads
    assert deleted + deleted_too == sum(saved) - len(steps) > 20
    assert steps == list(range(sum(saved) - len(steps), sum(saved)))


@pytest.mark.slow
def test_deleting_runs_beside_writers_leaves_none_half(backend):
    end = time.monotonic() + SECONDS
    alias = backend.runs.alias

    def write(number):
        while time.monotonic() < end:
            run = add_run(backend, status="failed")
            for state in ({"small": 1}, {"text": LARGE}):
                with_states(run.id, state)

    def with_states(run_id, state):
        try:
            backend.states.save_state(run_id, state, "node")
        except ValueError as exc:
            assert "not found" in str(exc)

    def delete(_):
        deleted = 0
        while time.monotonic() < end:
            deleted += backend.runs.delete_finished(
                before=timezone.now() + timedelta(days=1), batch_size=3
            )
        return deleted

    work = [write, write, write, delete, delete]
    *_, deleted, deleted_too = in_threads(len(work), lambda n: work[n](n))

    assert deleted + deleted_too > 10
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM execution_states WHERE run_id NOT IN "
            "(SELECT id FROM workflow_runs)"
        )
        assert cursor.fetchone()[0] == 0


@contextmanager
def callers_transaction(backend):
    """Begin a transaction that has its snapshot already."""
    with transaction.atomic(using=backend.runs.alias):
        list(backend.runs.list_runs())
        yield


def elsewhere(backend, work):
    """Do something on another connection."""
    return in_threads(1, lambda _: work(backend))[0]


def saved_states(backend, run, count):
    writer, state = backend.states.writer(run.id), {}
    for number in range(count):
        state = changed_state(state, "grow", 3000 + number)
        writer.save_state(state, "node")
    return state


@pytest.mark.parametrize(
    "backend",
    # At the level serializable, MariaDB locks what is read, so that others cannot change it.
    [("postgres", "repeatable read"), ("postgres", "serializable"), ("mysql", "repeatable read")],
    indirect=True,
)
class TestInTheCallersSnapshot:
    def test_states_are_deleted_only_where_newer_ones_are_seen(self, backend):
        run = add_run(backend)
        saved_states(backend, run, 2)

        with callers_transaction(backend):
            newest = elsewhere(backend, lambda backend: saved_states(backend, run, 7))
            if is_postgresql(backend):
                with pytest.raises(SnapshotError, match=r"outside of transaction\.atomic\(\)"):
                    backend.states.delete_states(run.id, keep_last=1)
            else:
                assert backend.states.delete_states(run.id, keep_last=1) == 8

        assert backend.states.get_latest_state(run.id) == newest

    @pytest.mark.parametrize("kept", [1, 3])
    def test_states_are_not_copied_to_a_run_that_has_got_some_since(self, backend, kept):
        source, run = add_run(backend), add_run(backend)
        saved_states(backend, source, 3)

        def save_and_delete(backend):
            saved_states(backend, run, 3)
            backend.states.delete_states(run.id, keep_last=kept)

        with pytest.raises(StorageError), callers_transaction(backend):
            elsewhere(backend, save_and_delete)
            backend.states.copy_states(source.id, run.id, through=2)

        steps = [step["step"] for step in backend.states.iter_steps(run.id)]
        assert steps == [0, 1, 2][-kept:]

    def test_whoever_reads_attempts_keeps_nobody_waiting(self, backend):
        run = add_run(backend, status="running")

        with callers_transaction(backend):
            assert len(backend.runs.list_attempts(run.id)) == 1
            elsewhere(backend, lambda backend: backend.runs.update_status(run.id, "completed"))

        assert backend.runs.list_attempts(run.id)[0].status == "completed"

    @pytest.mark.parametrize("verb", ["delete", "delete_finished", "delete_unchanged"])
    def test_a_run_that_has_got_a_state_since_is_not_deleted_in_half(self, backend, verb):
        run = add_run(backend, status="failed")
        calls = {
            "delete": lambda: backend.runs.delete(run.id),
            "delete_finished": lambda: backend.runs.delete_finished(
                before=timezone.now() + timedelta(days=1)
            ),
            "delete_unchanged": lambda: backend.runs.delete_unchanged(run, None),
        }

        def delete():
            with callers_transaction(backend):
                elsewhere(backend, lambda backend: saved_states(backend, run, 1))
                calls[verb]()

        if is_postgresql(backend):
            with pytest.raises(StorageUnavailableError, match="Roll your transaction back and run"):
                delete()
            assert backend.states.get_latest_state(run.id) is not None
        elif verb == "delete_unchanged":
            with pytest.raises(ValueError, match="not as it was read"):
                delete()
            assert backend.states.get_latest_state(run.id) is not None
        else:
            delete()
            assert backend.runs.get(run.id) is None
            assert backend.states.get_latest_state(run.id) is None

    @pytest.mark.parametrize("state", [{"small": 1}, {"text": LARGE}], ids=["small", "large"])
    def test_a_state_is_the_next_one_or_the_error_says_to_roll_back(self, backend, state):
        run = add_run(backend)
        saved_states(backend, run, 1)

        def save():
            with callers_transaction(backend):
                elsewhere(backend, lambda backend: saved_states(backend, run, 2))
                return backend.states.save_state(run.id, state, "node")

        if is_postgresql(backend):
            with pytest.raises(StorageUnavailableError, match="Roll your transaction back and run"):
                save()
            assert len(backend.states.get_state_history(run.id)) == 3
        else:
            assert save() == 3
            assert len(backend.states.get_state_history(run.id)) == 4
            assert backend.states.get_latest_state(run.id) == state

    def test_what_changed_since_is_not_told_as_it_was(self, backend):
        run = add_run(backend)
        expected = StorageUnavailableError if is_postgresql(backend) else StatusConflictError

        with pytest.raises(expected, match=r"Roll your|is running"), callers_transaction(backend):
            elsewhere(backend, lambda backend: backend.runs.update_status(run.id, "running"))
            backend.runs.update_status(run.id, "running", expected="pending")

        exists = StorageUnavailableError if is_postgresql(backend) else RunAlreadyExistsError
        with pytest.raises(exists, match=r"Roll your|already exists"), callers_transaction(backend):
            elsewhere(backend, lambda backend: backend.runs.add(new_run(id="twice")))
            backend.runs.add(new_run(id="twice"))

    @pytest.mark.parametrize("sign", ["heartbeat", "state"])
    def test_a_run_with_a_sign_of_life_since_is_not_failed(self, backend, sign):
        hour = timedelta(hours=1)
        run = add_run(backend, status="running", started_at=timezone.now() - 2 * hour)
        give = {
            "heartbeat": lambda backend: backend.runs.heartbeat(run.id),
            "state": lambda backend: backend.states.save_state(run.id, {}, "node"),
        }

        with callers_transaction(backend):
            elsewhere(backend, give[sign])
            if is_postgresql(backend):
                with pytest.raises(SnapshotError, match=r"outside of transaction\.atomic\(\)"):
                    backend.runs.fail_stalled(hour)
            else:
                assert backend.runs.fail_stalled(hour) == 0

        assert read_run(backend, run).status == "running"

    @pytest.mark.parametrize("has_receiver", [False, True], ids=["", "with a receiver"])
    def test_a_run_added_since_is_deleted_whole_or_not_found(self, backend, has_receiver):
        deleted = []

        def receive(sender, instance, **kwargs):
            deleted.append(instance.pk)

        with callers_transaction(backend):
            run = elsewhere(backend, added_run)
            if has_receiver:
                pre_delete.connect(receive, sender=WorkflowRun)
            try:
                with expected_not_to_be_found(backend):
                    backend.runs.delete(run.id)
            finally:
                pre_delete.disconnect(receive, sender=WorkflowRun)

        is_there = is_postgresql(backend)
        assert (backend.runs.get(run.id) is not None) is is_there
        assert (backend.states.get_latest_state(run.id) is not None) is is_there
        assert label_rows(backend, run) == (run.labels if is_there else {})
        assert deleted == ([] if is_there or not has_receiver else [run.id])

    @pytest.mark.parametrize(
        "change", [{"labels": {"tenant": "acme"}}, {"add_labels": {"tenant": "acme"}}]
    )
    def test_the_labels_of_a_run_added_since_stay_in_their_index(self, backend, change):
        with callers_transaction(backend):
            run = elsewhere(backend, added_run)
            with expected_not_to_be_found(backend):
                backend.runs.update(run.id, **change)

        assert read_run(backend, run).labels == label_rows(backend, run) == run.labels

    def test_the_labels_of_a_run_added_since_need_no_repair(self, backend):
        with callers_transaction(backend):
            run = elsewhere(backend, added_run)
            assert backend.check_indexes([run], repair=True) == []

        assert label_rows(backend, run) == run.labels

    def test_the_labels_of_a_run_added_since_are_repaired(self, backend):
        with callers_transaction(backend):
            run = elsewhere(backend, added_run)
            elsewhere(backend, lambda backend: labels_of(backend, run).update(value="other"))
            damages = backend.check_indexes([run], repair=True)

        if is_postgresql(backend):
            assert damages == []  # it is not there yet
        else:
            assert [damage.repaired for damage in damages] == [True]
            assert label_rows(backend, run) == run.labels

    def test_an_attempt_that_others_kept_since_is_there_once(self, backend):
        run = add_run(backend, status="running", attempt=1)

        def fail(backend):
            backend.runs.update_status(run.id, "pending")
            backend.runs.update_status(run.id, "failed", error_message="of the end")

        def begin():
            with callers_transaction(backend):
                elsewhere(backend, fail)
                backend.runs.update_status(run.id, "running")

        if is_postgresql(backend):
            with pytest.raises(StorageUnavailableError, match="Roll your transaction back and run"):
                begin()
        else:
            begin()
        numbers = [attempt.number for attempt in backend.runs.list_attempts(run.id)]
        assert numbers == ([1] if is_postgresql(backend) else [1, 2])

    def test_an_attempt_that_is_kept_lets_others_keep_those_of_other_runs(self, backend):
        runs = [add_run(backend, status="failed", attempt=1) for _ in range(3)]

        with callers_transaction(backend):
            backend.runs.update_status(runs[1].id, "running")
            elsewhere(backend, lambda backend: backend.runs.update_status(runs[0].id, "running"))
            elsewhere(backend, lambda backend: backend.runs.update_status(runs[2].id, "running"))

        assert [len(backend.runs.list_attempts(run.id)) for run in runs] == [2, 2, 2]

    def test_attempts_that_others_took_away_since_are_put_again(self, backend):
        run = add_run(backend, status="running", attempt=1)
        backend.runs.update_status(run.id, "failed")
        backend.runs.update_status(run.id, "running")
        run, attempts = read_run(backend, run), backend.runs.list_attempts(run.id)

        def put():
            with callers_transaction(backend):
                elsewhere(backend, lambda backend: backend.runs.put(run, over=run))
                backend.runs.put(run, over=run, attempts=attempts)

        if is_postgresql(backend):
            with pytest.raises(StorageUnavailableError, match="Roll your transaction back and run"):
                put()
            attempts = attempts[1:]
        else:
            put()
        assert backend.runs.list_attempts(run.id) == attempts

    @pytest.mark.parametrize("name", ["tenant", "keep"])
    def test_a_run_with_another_label_since_is_not_deleted(self, backend, name):
        labels = {"tenant": "acme", "keep": "no"}
        run = add_run(backend, status="completed", labels=labels)
        tomorrow = timezone.now() + timedelta(days=1)

        def delete():
            with callers_transaction(backend):
                elsewhere(
                    backend,
                    lambda backend: backend.runs.update(run.id, add_labels={name: "other"}),
                )
                return backend.runs.delete_finished(before=tomorrow, labels=labels)

        if is_postgresql(backend):
            with pytest.raises(StorageUnavailableError, match="Roll your transaction back and run"):
                delete()
        else:
            assert delete() == 0
        assert read_run(backend, run).labels == {**labels, name: "other"}


def added_run(backend):
    run = add_run(backend, status="completed", labels={"tenant": "acme"})
    backend.states.save_state(run.id, {}, "node")
    return run


def expected_not_to_be_found(backend):
    """Expect that PostgreSQL finds no run that was added since; the others find what they lock."""
    return pytest.raises(RunNotFoundError) if is_postgresql(backend) else nullcontext()


def labels_of(backend, run):
    return WorkflowRunLabel.objects.using(backend.runs.alias).filter(run_id=run.id)


def label_rows(backend, run):
    return dict(labels_of(backend, run).values_list("name", "value"))
