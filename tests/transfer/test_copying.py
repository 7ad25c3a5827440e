"""Copying and moving runs: all of it, nothing twice, nothing lost."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from django.db import OperationalError, connections, transaction
from django.utils import timezone

from tests.transfer.conftest import assert_equal, both, filled, outcomes
from workflow_storage import (
    Checkpoint,
    RunChangedError,
    StorageUnavailableError,
    create_storage_backend,
)
from workflow_storage.factory import forget
from workflow_storage.testing import changed_state, in_threads, new_run, stored_run
from workflow_storage.transfer import (
    CannotMoveError,
    SameStoreError,
    copy_changed_runs,
    copy_runs,
    export_runs,
    import_runs,
)
from workflow_storage.validation import equal_checkpoints, equal_runs


def test_a_copy_is_the_same_a_second_one_copies_nothing_a_third_what_is_new(stores):
    source, target = stores
    filled(source)

    assert set(outcomes(copy_runs(source, target)).values()) == {"copied"}
    assert_equal(source, target)

    again = list(copy_runs(source, target))
    assert {result.outcome for result in again} == {"unchanged"}
    assert sum(result.states for result in again) == 0
    assert_equal(source, target)

    grown, ended, same = "cancelled \N{GRINNING FACE}", "running \N{GRINNING FACE}", "same start 0"
    state = source.states.get_latest_state(grown)
    for step in range(7):
        state = changed_state(state, "grow", 3000 + step)
        source.states.save_state(grown, state, "later")
    source.runs.update_status(ended, "completed", outputs="done")

    results = {result.run_id: result for result in copy_runs(source, target)}

    assert (results[grown].outcome, results[grown].states) == ("updated", 7)
    assert (results[ended].outcome, results[ended].states) == ("updated", 0)
    assert results[same].outcome == "unchanged"
    assert_equal(source, target)


def test_moving_leaves_what_is_not_finished(stores):
    source, target = stores
    filled(source, states=3)
    before = {run.id: run for run in source.runs.iter_runs()}
    histories = {run_id: source.states.get_state_history(run_id) for run_id in before}

    results = list(copy_runs(source, target, move=True))

    assert all(result.outcome == "copied" for result in results)
    left = {run.id for run in source.runs.iter_runs()}
    assert left == {
        run_id for run_id, run in before.items() if run.status in {"pending", "running"}
    }
    assert {result.run_id for result in results if result.deleted} == before.keys() - left
    for run_id, run in before.items():
        assert equal_runs(target.runs.get(run_id), run)
        moved = target.states.get_state_history(run_id)
        assert len(moved) == len(histories[run_id])
        assert all(map(equal_checkpoints, histories[run_id], moved))


def test_filters_choose_the_runs(two):
    source, target = two
    filled(source)

    list(copy_runs(source, target, workflow_name="work'flow-0", status=["completed", "cancelled"]))

    assert [run.status for run in target.runs.iter_runs()] == ["cancelled", "completed"]


def test_another_run_with_the_same_id_is_refused_and_untouched(two):
    source, target = two
    stored_run(source, id="same", inputs="source")
    stored_run(source, id="other")
    stored_run(target, id="same", inputs="target", workflow_name="different")

    results = {result.run_id: result for result in copy_runs(source, target)}

    assert results["same"].outcome == "refused"
    assert "another run with this id, of 'different'" in results["same"].reason
    assert results["other"].outcome == "copied"
    assert target.runs.get("same").inputs == "target"


def test_a_run_that_went_on_in_the_target_is_never_set_back(two):
    source, target = two
    run = stored_run(source, status="failed")
    source.states.save_state(run.id, {"n": 0}, "node")
    list(copy_runs(source, target))
    target.states.save_state(run.id, {"n": 1}, "node")
    target.runs.update_status(run.id, "completed", outputs="resumed")

    for move in (False, True):
        (result,) = copy_runs(source, target, move=move)
        assert (result.outcome, result.deleted) == ("refused", False)
        assert "states up to step 1, which are not here" in result.reason

    assert target.runs.get(run.id).outputs == "resumed"
    assert len(target.states.get_state_history(run.id)) == 2
    assert source.runs.get(run.id).status == "failed"


@pytest.mark.parametrize("kinds", [("redis", "postgres"), ("sqlite", "redis")])
def test_nothing_is_moved_inside_a_transaction(request, django_db_blocker, kinds):
    urls = [request.getfixturevalue(f"{kind}_url") for kind in kinds]
    with both(*urls, django_db_blocker) as (source, target):
        run = stored_run(source, status="completed")
        alias = next(store.alias for store in (source, target) if store.alias)
        with (
            transaction.atomic(using=alias),
            pytest.raises(CannotMoveError, match="inside a transaction"),
        ):
            list(copy_runs(source, target, move=True))
        assert source.runs.get(run.id) is not None
        with transaction.atomic(using=alias):
            list(copy_runs(source, target))
        assert target.runs.get(run.id) is not None


def test_a_transaction_with_one_snapshot_sees_what_changed_since(mysql_url, django_db_blocker):
    with django_db_blocker.unblock():
        other = create_storage_backend(mysql_url)
        backend = create_storage_backend(f"{mysql_url}?isolation_level=repeatable%20read")
        run = stored_run(other, status="completed")
        other.states.save_state(run.id, {}, "node")

        def in_a_snapshot(change, call):
            with transaction.atomic(using=backend.alias):
                read = backend.runs.get(run.id)
                last = backend.states.get_latest_checkpoint(run.id)
                in_threads(1, lambda _: change())
                with pytest.raises(RunChangedError):
                    call(read, last)

        in_a_snapshot(
            lambda: other.states.save_state(run.id, {}, "late"), backend.runs.delete_unchanged
        )
        in_a_snapshot(
            lambda: other.runs.update(run.id, outputs="late"),
            lambda read, _: backend.runs.put(read, over=read),
        )
        in_a_snapshot(
            lambda: other.runs.update(run.id, outputs="later"), backend.runs.delete_unchanged
        )
        assert other.runs.get(run.id).outputs == "later"
        other.runs.delete(run.id)
        forget(backend.alias)


def test_an_append_that_is_tried_again_loses_no_state(mysql_url, django_db_blocker):
    with django_db_blocker.unblock():
        backend = create_storage_backend(mysql_url)
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        inserts = itertools.count()

        def once(execute, sql, params, many, context):
            if sql.startswith("INSERT") and next(inserts) == 5:
                raise OperationalError(1213, "Deadlock found when trying to get lock")
            return execute(sql, params, many, context)

        now = timezone.now()
        checkpoints = (
            Checkpoint(step=step, node_id="node", state_data={"n": step}, created_at=now)
            for step in range(10)
        )
        with connections[backend.alias].execute_wrapper(once):
            assert writer.append(checkpoints) == 10
        assert next(inserts) > 10
        history = backend.states.get_state_history(run.id)
        assert [one["step"] for one in history] == list(range(10))
        backend.runs.delete(run.id)


def test_what_was_changed_in_the_target_is_kept_though_no_time_tells(two):
    source, target = two
    run = stored_run(source, status="completed")
    list(copy_runs(source, target))
    target.runs.update(run.id, outputs="corrected")

    for move in (False, True):
        (result,) = copy_runs(source, target, move=move)
        assert (result.outcome, result.deleted) == ("refused", False)
        assert "neither is newer" in result.reason
    assert target.runs.get(run.id).outputs == "corrected"


def test_the_source_wins_where_no_time_tells_and_that_is_asked_for(two):
    source, target = two
    ended = stored_run(source, status="completed", started_at=timezone.now() - timedelta(hours=2))
    again = stored_run(source, status="failed")
    list(copy_runs(source, target))
    source.runs.update(ended.id, add_labels={"seen": "yes"})
    target.runs.update(ended.id, add_labels={"there": "too"})
    target.runs.update_status(again.id, "running")
    target.runs.update(again.id, add_labels={"there": "too"})

    done = {one.run_id: one for one in copy_runs(source, target, overwrite=True, move=True)}

    assert (done[ended.id].outcome, done[ended.id].deleted) == ("updated", True)
    assert target.runs.get(ended.id).labels == {"seen": "yes"}
    assert target.runs.count_runs(labels={"there": "too"}) == 1
    assert done[again.id].outcome == "refused"
    assert "changed in the target" in done[again.id].reason
    assert target.runs.get(again.id).status == "running"


def test_a_run_that_was_queued_again_is_the_newer_one(two):
    source, target = two
    run = stored_run(source, status="failed")
    list(copy_runs(source, target))
    target.runs.update_status(run.id, "pending")

    (result,) = copy_runs(source, target, move=True)
    assert (result.outcome, result.deleted) == ("refused", False)
    assert "changed in the target" in result.reason
    assert outcomes(copy_runs(target, source)) == {run.id: "updated"}
    assert source.runs.get(run.id).status == "pending"


def test_a_run_that_was_begun_again_brings_its_attempts(two):
    source, target = two
    run = stored_run(source, status="running")
    source.runs.update_status(run.id, "failed", error_message="first")
    list(copy_runs(source, target))
    source.runs.update_status(run.id, "running", attempt=1, expected="failed")

    assert outcomes(copy_runs(source, target)) == {run.id: "updated"}

    assert target.runs.list_attempts(run.id) == source.runs.list_attempts(run.id)
    assert [one.error_message for one in target.runs.list_attempts(run.id)] == ["first", None]
    source.runs.update_status(run.id, "completed", attempt=2)
    (done,) = copy_runs(source, target, move=True)
    assert (done.outcome, done.deleted) == ("updated", True)
    assert [one.status for one in target.runs.list_attempts(run.id)] == ["failed", "completed"]


def test_a_run_whose_attempts_do_not_read_back_equal_is_not_deleted(two, monkeypatch):
    source, target = two
    run = stored_run(source, status="failed", attempt=3)
    monkeypatch.setattr(target.runs, "list_attempts", lambda run_id: [])

    (done,) = copy_runs(source, target, move=True)

    assert not done.deleted
    assert "does not read back equal" in done.reason
    assert source.runs.get(run.id) is not None


def test_a_run_whose_states_went_on_in_the_target_is_refused(two):
    source, target = two
    run = stored_run(source, status="running")
    source.states.save_state(run.id, {"n": 0}, "node")
    list(copy_runs(source, target))
    target.states.save_state(run.id, {"n": 1}, "node")
    source.runs.update_status(run.id, "failed")

    (result,) = copy_runs(source, target)
    assert result.outcome == "refused"
    assert "states up to step 1, which are not here" in result.reason
    assert target.runs.get(run.id).status == "running"


def test_a_run_that_was_begun_anew_in_the_source_is_refused(two):
    source, target = two
    run = stored_run(source, status="running")
    for number in range(5):
        source.states.save_state(run.id, {"n": number}, "node")
    list(copy_runs(source, target))
    source.states.delete_states(run.id)
    source.states.save_state(run.id, {"fresh": 1}, "node")
    source.runs.update_status(run.id, "completed")

    (result,) = copy_runs(source, target)
    assert result.outcome == "refused"
    assert len(target.states.get_state_history(run.id)) == 5


def test_a_run_that_is_deleted_meanwhile_is_not_copied_as_one_without_states(
    two, tmp_path, monkeypatch
):
    source, target = two
    for number in range(3):
        run = stored_run(source, id=f"run-{number}", status="completed")
        source.states.save_state(run.id, {}, "node")

    copying = copy_runs(source, target)
    next(copying)
    source.runs.delete("run-1")
    assert [result.run_id for result in copying] == ["run-0"]
    assert target.runs.get("run-1") is None

    exporting = export_runs(source, tmp_path / "x")
    next(exporting)
    source.runs.delete("run-0")
    assert [result.outcome for result in exporting] == ["refused"]
    assert len(list(import_runs(tmp_path / "x", target))) == 1

    source.states.save_state("run-2", {}, "node")
    read = source.states.iter_encoded

    def read_and_delete(run_id):
        yield next(read(run_id))
        source.runs.delete(run_id)

    target.runs.delete("run-2")
    monkeypatch.setattr(source.states, "iter_encoded", read_and_delete)
    (result,) = export_runs(source, tmp_path / "x")
    assert (result.outcome, "states were deleted" in result.reason) == ("refused", True)
    (result,) = import_runs(tmp_path / "x", target)
    assert (result.outcome, "the file ends before it" in result.reason) == ("refused", True)
    assert len(target.states.get_state_history("run-2")) == 1


def test_two_processes_that_copy_the_same_do_not_disturb_each_other(two):
    source, target = two
    for number in range(30):
        run = stored_run(source, id=f"run-{number}", status="completed")
        for _ in range(5):
            source.states.save_state(run.id, {"n": number}, "node")

    for move in (False, True):
        results = in_threads(2, lambda _, move=move: list(copy_runs(source, target, move=move)))
        for result in sum(results, []):  # noqa: RUF017
            assert (result.outcome != "refused", result.reason) == (True, "")
    assert (source.runs.count_runs(), target.runs.count_runs()) == (0, 30)
    assert all(len(target.states.get_state_history(f"run-{n}")) == 5 for n in range(30))


def test_a_running_run_with_an_end_is_not_moved(two):
    source, target = two
    run = new_run(status="running", completed_at=timezone.now())
    source.runs.put(run)
    (result,) = copy_runs(source, target, move=True)
    assert not result.deleted
    assert source.runs.get(run.id) is not None


def test_a_run_that_went_on_differently_in_both_is_refused(two):
    source, target = two
    run = stored_run(source)
    list(copy_runs(source, target))
    for store, number in zip(two, range(2), strict=True):
        store.states.save_state(run.id, {"n": number}, "node")
    source.states.save_state(run.id, {"n": 2}, "node")

    (result,) = copy_runs(source, target)

    assert result.outcome == "refused"
    assert "another state at step 0" in result.reason
    assert target.states.get_latest_state(run.id) == {"n": 1}


def test_states_that_were_deleted_in_the_source_since_stay_in_the_target(two):
    source, target = two
    run = stored_run(source, status="completed")
    for number in range(10):
        source.states.save_state(run.id, {"n": number}, "node")
    list(copy_runs(source, target))
    source.states.delete_states(run.id, keep_last=2)
    assert outcomes(copy_runs(source, target)) == {run.id: "unchanged"}
    source.states.save_state(run.id, {"n": 10}, "node")

    (result,) = copy_runs(source, target, move=True)

    assert (result.outcome, result.states, result.deleted) == ("updated", 1, True)
    steps = [checkpoint["step"] for checkpoint in target.states.get_state_history(run.id)]
    assert steps == list(range(11))


def test_states_that_are_missing_in_between_are_refused(two):
    source, target = two
    run = stored_run(source)
    source.states.save_state(run.id, {"n": 0}, "node")
    list(copy_runs(source, target))
    for number in range(1, 10):
        source.states.save_state(run.id, {"n": number}, "node")
    source.states.delete_states(run.id, keep_last=2)

    (result,) = copy_runs(source, target)

    assert result.outcome == "refused"
    assert "up to step 0, and the next one here is step 8" in result.reason


@pytest.mark.parametrize("change", ["fields", "state"])
def test_a_run_that_changes_after_it_was_read_back_is_not_deleted(two, change, monkeypatch):
    source, target = two
    run = stored_run(source, status="completed")
    source.states.save_state(run.id, {"n": 0}, "node")
    delete = source.runs.delete_unchanged

    def change_first(*args):
        if change == "fields":
            source.runs.update(run.id, outputs="late")
        else:
            source.states.save_state(run.id, {"n": 1}, "node")
        delete(*args)

    monkeypatch.setattr(source.runs, "delete_unchanged", change_first)
    (result,) = copy_runs(source, target, move=True)

    assert (result.outcome, result.deleted) == ("copied", False)
    assert "not as it was read" in result.reason
    assert source.runs.get(run.id) is not None


def test_a_run_that_does_not_read_back_equal_is_not_deleted(two, monkeypatch):
    source, target = two
    run = stored_run(source, status="completed")
    for number in range(3):
        source.states.save_state(run.id, {"n": number}, "node")
    real_writer = target.states.writer

    class Writer:
        def __init__(self, run_id):
            self.run_id = run_id

        def append_encoded(self, checkpoints):
            wrong = [one._replace(stored=b'{"n":1.0}', text=b'{"n":1.0}') for one in checkpoints]
            return real_writer(self.run_id).append_encoded(wrong)

    monkeypatch.setattr(target.states, "writer", Writer)
    (result,) = copy_runs(source, target, move=True)

    assert not result.deleted
    assert source.runs.get(run.id) is not None


@pytest.mark.parametrize("move", [False, True])
def test_a_store_is_not_copied_to_itself(any_backend, move):
    stored_run(any_backend, status="completed")
    with pytest.raises(SameStoreError, match="are the same store"):
        list(copy_runs(any_backend, any_backend, move=move))


def test_a_store_is_not_copied_or_moved_to_itself_under_another_name(any_url, any_backend):
    run = stored_run(any_backend, status="completed")
    separator = "&" if "?" in any_url else "?"
    other = {"sqlite": any_url.replace("sqlite:///", "sqlite:////")}.get(
        any_url.partition(":")[0],
        f"{any_url}{separator}{'socket_timeout' if 'redis' in any_url else 'connect_timeout'}=9",
    )
    again = create_storage_backend(other)

    for move in (True, False):
        with pytest.raises(SameStoreError, match="are the same store"):
            list(copy_runs(any_backend, again, move=move))

    assert any_backend.runs.get(run.id) is not None
    assert any_backend.runs.count_runs() == 1
    if again.alias is None:
        again.close()
    elif again.alias != any_backend.alias:
        forget(again.alias)


COPY = """
import sys
from workflow_storage import copy_runs, create_storage_backend
source, target = map(create_storage_backend, sys.argv[1:3])
print("begun", flush=True)
for done in copy_runs(source, target, move=sys.argv[3] == "move"):
    pass
"""


@pytest.mark.parametrize(
    ("kinds", "move"),
    [
        (("redis", "sqlite"), "copy"),
        (("postgres", "redis"), "move"),
    ],
)
@pytest.mark.slow
def test_a_copy_that_is_killed_again_and_again_is_complete_in_the_end(
    request, django_db_blocker, kinds, move
):
    urls = [request.getfixturevalue(f"{kind}_url") for kind in kinds]
    with both(*urls, django_db_blocker) as (source, target):
        expected = {}
        for number in range(40):
            run = stored_run(source, status="completed", inputs=number)
            writer = source.states.writer(run.id)
            state = {}
            for step in range(20):
                state = changed_state(state, "grow", 500 + number + step)
                writer.save_state(state, f"node-{step}")
            expected[run.id] = (run, source.states.get_state_history(run.id))
        chance = random.Random(5)
        killed = 0
        for attempt in range(40):
            process = subprocess.Popen(
                [sys.executable, "-c", COPY, *urls, move], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout.readline() == "begun\n"
            if attempt < 4:
                time.sleep(chance.uniform(0, 0.25))
                os.kill(process.pid, signal.SIGKILL)
            returncode = process.wait(timeout=60)
            process.stdout.close()
            killed += returncode == -signal.SIGKILL
            there = {run.id for store in (source, target) for run in store.runs.iter_runs()}
            assert there == expected.keys()
            if returncode == 0:
                break

        assert killed
        assert source.runs.count_runs() == (0 if move == "move" else 40)
        for run_id, (run, history) in expected.items():
            assert equal_runs(target.runs.get(run_id), run)
            copied = target.states.get_state_history(run_id)
            assert len(copied) == len(history)
            assert all(map(equal_checkpoints, copied, history))


def test_a_store_that_is_down_ends_the_copying(two):
    source, _ = two
    stored_run(source)
    down = create_storage_backend("redis://127.0.0.1:1/0?socket_connect_timeout=1")
    with pytest.raises(StorageUnavailableError):
        list(copy_runs(source, down))


def test_a_run_with_a_damaged_state_is_refused_and_the_others_are_copied(two):
    source, target = two
    run = stored_run(source)
    source.states.save_state(run.id, {}, "node")
    from workflow_storage import ExecutionState

    states = ExecutionState.objects.using(source.alias).filter(run_id=run.id)
    states.update(state_json="damaged")
    stored_run(source, id="other")

    results = {result.run_id: result for result in copy_runs(source, target)}

    assert results[run.id].outcome == "refused"
    assert "cannot be rebuilt" in results[run.id].reason
    assert results["other"].outcome == "copied"


def test_what_has_changed_since_is_copied(stores):
    source, target = stores
    begin = timezone.now()
    early = begin - timedelta(days=1)
    ended = stored_run(source, status="completed", started_at=early)
    running, resumed = (
        stored_run(source, status=status, started_at=early) for status in ("running", "failed")
    )
    assert [one.outcome for one in copy_runs(source, target)] == ["copied"] * 3

    source.runs.update_status(running.id, "completed")
    source.runs.update_status(resumed.id, "running")
    new = stored_run(source, workflow_name="new")
    source.runs.update(ended.id, add_labels={"late": "yes"})
    results = list(copy_changed_runs(source, target, since=begin))

    assert {one.run_id: one.outcome for one in results if one.outcome != "unchanged"} == {
        running.id: "updated",
        resumed.id: "updated",
        new.id: "copied",
    }
    assert target.runs.get(running.id).status == "completed"
    only = copy_changed_runs(source, target, since=begin, workflow_name="new")
    assert {one.run_id for one in only} == {new.id}
