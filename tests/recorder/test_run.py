"""What a recorded run offers: checkpoints, usage, and the signals that tell of them."""

import pytest
from asgiref.sync import async_to_sync
from django.db import connections, transaction

from tests.recorder.conftest import only_run
from workflow_storage import (
    InvalidFieldError,
    InvalidPayloadError,
    StatusConflictError,
    record_run,
)
from workflow_storage.signals import checkpoint_saved, run_finished, run_started
from workflow_storage.testing import changed_state, in_threads


class TestRecordedRun:
    def test_usage_adds_up_and_is_stored_with_checkpoints(self, backend):
        with record_run("w", backend=backend) as run:
            run.add_usage(tokens=10, cost_usd=0.5)
            run.add_usage(tokens=5)
            run.save_state({}, "node")
            assert only_run(backend).total_tokens == 15
            run.add_usage(cost_usd=0.25)

        stored = only_run(backend)
        assert (stored.total_tokens, stored.total_cost_usd) == (15, 0.75)

    def test_totals_that_the_author_sets_are_stored(self, backend):
        with record_run("w", backend=backend) as run:
            assert (run.total_tokens, run.total_cost_usd) == (None, None)
            run.total_tokens, run.total_cost_usd = 7, 0.5
            run.add_usage(tokens=1)

        stored = only_run(backend)
        assert (stored.total_tokens, stored.total_cost_usd) == (8, 0.5)

    def test_a_checkpoint_of_a_recorded_run_reads_no_state(self, sql_backend):
        statements = []

        def collect(execute, sql, params, many, context):
            statements.append(sql)
            return execute(sql, params, many, context)

        with record_run("w", backend=sql_backend) as run:
            state = changed_state({}, "grow", 9000)
            run.save_state(state, "first")
            with connections[sql_backend.alias].execute_wrapper(collect):
                for _ in range(10):
                    state = changed_state(state, "grow", 1000)
                    run.save_state(state, "node")

        assert sum("INSERT INTO" in sql for sql in statements) == 10
        selects = [sql for sql in statements if sql.startswith("SELECT")]
        assert not [sql for sql in selects if "state_json" in sql]

    def test_another_process_that_writes_too_is_noticed(self, backend):
        with record_run("w", backend=backend) as run:
            run.save_state(changed_state({}, "grow", 9000), "own")
            backend.states.save_state(run.run_id, changed_state({}, "grow", 9001), "other")
            assert run.save_state(changed_state({}, "grow", 9002), "own") == 2

        nodes = [state["node_id"] for state in backend.states.get_state_history(run.run_id)]
        assert nodes == ["own", "other", "own"]

    def test_nodes_in_threads_share_a_run(self, backend):
        with record_run("w", backend=backend) as run:
            steps = in_threads(4, lambda n: [run.save_state({"n": n}, f"n-{n}") for _ in range(5)])
            in_threads(4, lambda n: run.add_usage(tokens=1))

        assert sorted(sum(steps, [])) == list(range(20))  # noqa: RUF017
        assert only_run(backend).total_tokens == 4

    @pytest.mark.parametrize(
        "usage",
        [
            {"tokens": 1.5},
            {"tokens": True},
            {"tokens": 2**63},
            {"cost_usd": float("nan")},
            {"tokens": 5, "cost_usd": "1"},
        ],
        ids=str,
    )
    def test_usage_that_is_no_number_is_refused_and_nothing_added(self, backend, usage):
        with record_run("w", backend=backend) as run:
            run.add_usage(tokens=1, cost_usd=0.5)
            with pytest.raises(InvalidFieldError):
                run.add_usage(**usage)

        stored = only_run(backend)
        assert (stored.total_tokens, stored.total_cost_usd) == (1, 0.5)

    def test_usage_survives_a_rollback_and_a_result_that_cannot_be_stored(self, sql_backend):
        with pytest.raises(InvalidPayloadError), record_run("w", backend=sql_backend) as run:
            with pytest.raises(OSError), transaction.atomic(using=sql_backend.alias):
                run.add_usage(tokens=7)
                run.save_state({"rolled": "back"}, "one")
                raise OSError
            run.save_state({"kept": True}, "two")
            assert (run.step, run.state, run.node_id) == (0, {"kept": True}, "two")
            run.outputs = object()

        assert (only_run(sql_backend).status, only_run(sql_backend).total_tokens) == ("failed", 7)

    def test_nothing_is_saved_after_the_end(self, backend):
        with record_run("w", backend=backend) as run:
            pass
        with pytest.raises(StatusConflictError, match="is completed, expected running"):
            run.save_state({}, "node")
        assert backend.states.get_latest_state(run.run_id) is None


class TestSignals:
    @pytest.fixture
    def received(self):
        received = []

        def note(name):
            def receiver(sender, run, **kwargs):
                received.append((name, run.run_id, run.status.value, kwargs.get("node_id")))

            return receiver

        receivers = {
            run_started: note("started"),
            checkpoint_saved: note("checkpoint"),
            run_finished: note("finished"),
        }
        for sent, receiver in receivers.items():
            sent.connect(receiver)
        yield received
        for sent, receiver in receivers.items():
            sent.disconnect(receiver)

    def test_signals_tell_of_start_checkpoints_and_end(self, backend, received):
        with record_run("w", run_id="a", backend=backend) as run:
            run.save_state({}, "node")
        with pytest.raises(OSError), record_run("w", run_id="b", backend=backend):
            raise OSError

        assert received == [
            ("started", "a", "running", None),
            ("checkpoint", "a", "running", "node"),
            ("finished", "a", "completed", None),
            ("started", "b", "running", None),
            ("finished", "b", "failed", None),
        ]

    def test_signals_wait_for_the_commit(self, sql_backend, received):
        with pytest.raises(OSError), transaction.atomic(using=sql_backend.alias):
            with record_run("w", backend=sql_backend):
                pass
            assert received == []
            raise OSError
        assert received == []

        with transaction.atomic(using=sql_backend.alias):
            with record_run("w", backend=sql_backend):
                pass
            assert received == []
        assert [name for name, *_ in received] == ["started", "finished"]

    def test_an_error_of_a_receiver_is_logged_and_stops_nobody(self, backend, received, caplog):
        def broken(sender, **kwargs):
            raise RuntimeError("the receiver broke")

        run_started.connect(broken)
        try:
            with record_run("w", backend=backend):
                pass
        finally:
            run_started.disconnect(broken)

        assert only_run(backend).status == "completed"
        assert [name for name, *_ in received] == ["started", "finished"]
        assert "the receiver broke" in caplog.text

    def test_signals_are_sent_from_async_code(self, backend, received):
        async def use():
            async with record_run("w", run_id="a", backend=backend) as run:
                await run.asave_state({}, "node")

        async_to_sync(use)()

        assert [name for name, *_ in received] == ["started", "checkpoint", "finished"]
