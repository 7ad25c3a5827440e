"""What holds when several threads and processes use a store at once.

Run by `StorageContract`, or alone for a setup of a store that makes a difference here, such
as other options of the database.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

import pytest
from django.utils import timezone

from workflow_storage import RunStatus, StatusConflictError
from workflow_storage.testing.sample_runs import new_run, read_run, stored_run
from workflow_storage.testing.threads import in_threads, outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from workflow_storage import StorageBackend, WorkflowRun


def _save_states(
    open_backend: Callable[[], StorageBackend], run_id: str, writer: int, count: int
) -> list[int]:
    """Save states large enough to be based on one another, half of them by a writer."""
    states = open_backend().states
    state_writer = states.writer(run_id)
    steps = []
    for number in range(count):
        state = {"writer": writer, "count": number, "text": "text " * 1000}
        if number % 2:
            steps.append(states.save_state(run_id, state, f"writer-{writer}"))
        else:
            steps.append(state_writer.save_state(state, f"writer-{writer}"))
    return steps


def _begin_attempts(
    open_backend: Callable[[], StorageBackend], run_id: str, worker: str, turns: int
) -> list[int]:
    """Begin attempts of a run whenever it can be, and return their numbers.

    A worker "taking over" begins where another one is running; others resume, and fail at once.
    """
    runs = open_backend().runs
    begun = []
    for _ in range(turns):
        run = runs.get(run_id)
        assert run is not None
        if (run.status == RunStatus.RUNNING) != (worker == "taking over"):
            continue
        try:
            runs.update_status(
                run_id, "running", expected=run.status, attempt=run.attempt, worker=worker
            )
        except StatusConflictError:
            continue
        begun.append(run.attempt + 1)
        if worker != "taking over" or len(begun) % 2:
            outcome(functools.partial(runs.update_status, run_id, "failed", attempt=begun[-1]))
    return begun


class ConcurrencyContract:
    """What holds when several threads and processes use a store at once."""

    @pytest.fixture
    def open_backend(self) -> Callable[[], StorageBackend] | None:
        """Return a picklable callable that opens the same store in another process.

        None leaves the test with several processes out.
        """
        return None

    def test_concurrent_states_of_one_run_from_threads_are_all_kept(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)

        steps = in_threads(8, lambda n: _save_states(lambda: backend, run.id, n, 10))

        self._check_history(backend, run, steps)

    def test_concurrent_states_of_one_run_from_processes_are_all_kept(
        self, backend: StorageBackend, open_backend: Callable[[], StorageBackend] | None
    ) -> None:
        if open_backend is None:
            pytest.skip("give a fixture open_backend to test with several processes")
        run = stored_run(backend)

        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(3, mp_context=context) as pool:
            futures = [
                pool.submit(_save_states, open_backend, run.id, writer, 20) for writer in range(3)
            ]
            steps = [future.result(timeout=60) for future in futures]

        self._check_history(backend, run, steps)

    def test_no_two_processes_hold_the_same_attempt(
        self, backend: StorageBackend, open_backend: Callable[[], StorageBackend] | None
    ) -> None:
        if open_backend is None:
            pytest.skip("give a fixture open_backend to test with several processes")
        run = stored_run(backend, status="failed")
        workers = ["one", "another", "taking over"]

        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(3, mp_context=context) as pool:
            futures = [
                pool.submit(_begin_attempts, open_backend, run.id, worker, 150)
                for worker in workers
            ]
            begun = [future.result(timeout=60) for future in futures]

        numbers = sorted(itertools.chain(*begun))
        assert numbers == list(range(1, len(numbers) + 1))
        assert {
            attempt.number: attempt.worker for attempt in backend.runs.list_attempts(run.id)
        } == {number: worker for worker, own in zip(workers, begun, strict=True) for number in own}

    def _check_history(
        self, backend: StorageBackend, run: WorkflowRun, steps: list[list[int]]
    ) -> None:
        history = backend.states.get_state_history(run.id)
        total = sum(map(len, steps))
        assert [checkpoint["step"] for checkpoint in history] == list(range(total))
        assert sorted(itertools.chain(*steps)) == list(range(total))
        for writer, own_steps in enumerate(steps):
            assert own_steps == sorted(own_steps)
            for count, step in enumerate(own_steps):
                state = history[step]["state_data"]
                assert (state["writer"], state["count"]) == (writer, count)

    def test_of_concurrent_adds_of_one_id_one_succeeds(self, backend: StorageBackend) -> None:
        outcomes = in_threads(
            6, lambda n: outcome(lambda: backend.runs.add(new_run(id="same", inputs=n)))
        )

        assert sorted(outcomes) == ["RunAlreadyExistsError"] * 5 + ["done"]
        stored = backend.runs.get("same")
        assert stored is not None
        assert stored.inputs == outcomes.index("done")

    def test_of_concurrent_changes_from_one_status_one_succeeds(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)

        outcomes = in_threads(
            6,
            lambda n: outcome(
                lambda: backend.runs.update_status(run.id, "running", expected="pending", outputs=n)
            ),
        )

        assert sorted(outcomes) == ["StatusConflictError"] * 5 + ["done"]
        assert read_run(backend, run).outputs == outcomes.index("done")

    def test_everything_at_once_on_a_few_runs_fails_only_as_promised(
        self, backend: StorageBackend
    ) -> None:
        names = [f"run-{number}" for number in range(5)]
        allowed = {"done", "RunNotFoundError", "RunAlreadyExistsError"}

        def work(number: int) -> set[str]:
            seen = set()
            for turn in range(12):
                name = names[(number + turn) % 5]
                state = {"text": str(number) * (100 if turn % 2 else 6000)}
                for call in (
                    functools.partial(backend.runs.add, new_run(id=name)),
                    functools.partial(backend.states.save_state, name, state, "node"),
                    functools.partial(backend.runs.update_status, name, "completed"),
                    functools.partial(backend.states.delete_states, name, keep_last=2),
                    functools.partial(backend.runs.delete, name),
                ):
                    seen.add(outcome(call))
                if number == 0:
                    finished = functools.partial(
                        backend.runs.delete_finished, before=timezone.now()
                    )
                    seen.add(outcome(finished))
            return seen

        assert set().union(*in_threads(6, work)) <= allowed
        for run in backend.runs.iter_runs():
            steps = [state["step"] for state in backend.states.iter_state_history(run.id)]
            assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True

    def test_deleting_a_run_that_is_written_to_leaves_no_states(
        self, backend: StorageBackend
    ) -> None:
        for _ in range(5):
            run = stored_run(backend)

            def save_or_delete(number: int, run: WorkflowRun = run) -> str:
                if number == 0:
                    return outcome(lambda: backend.runs.delete(run.id))
                return outcome(lambda: _save_states(lambda: backend, run.id, number, 5))

            outcomes = in_threads(4, save_or_delete)

            assert outcomes[0] == "done"
            assert set(outcomes[1:]) <= {"done", "RunNotFoundError"}
            assert backend.runs.get(run.id) is None
            assert backend.states.get_state_history(run.id) == []
