"""What the async twins promise: what their methods promise.

Run by `StorageContract`, or alone once the repositories are written.
"""

from __future__ import annotations

import asyncio
import functools
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections
from django.utils import timezone

from workflow_storage import (
    AbstractExecutionStateRepository,
    AbstractWorkflowRunRepository,
    Checkpoint,
    RunAlreadyExistsError,
    RunLostError,
    RunNotFoundError,
    StateWriter,
    StorageBackend,
)
from workflow_storage.testing.sample_runs import ids, new_run, stored_run
from workflow_storage.testing.twins import flaws_of_twins


class AsyncContract:
    """What the async twins promise: the same."""

    def test_every_async_twin_of_the_runs_does_the_same(self, backend: StorageBackend) -> None:
        runs = backend.runs
        old = timezone.now() - timedelta(hours=2)

        async def use() -> None:
            run = new_run(status="running", started_at=old)
            await runs.aadd(run)
            with pytest.raises(RunAlreadyExistsError):
                await runs.aadd(new_run(id=run.id))
            assert ids(await runs.alist_stalled(timedelta(hours=1))) == [run.id]
            assert await runs.afail_stalled(timedelta(hours=1)) == 1
            assert await runs.afail_stalled(timedelta(hours=1), run_id=run.id) == 0
            await runs.aupdate_status(run.id, "running", expected="failed", attempt=1)
            await runs.aupdate(run.id, outputs=1, attempt=2)
            await runs.aheartbeat(run.id, attempt=2, node="node")
            with pytest.raises(RunLostError):
                await runs.aheartbeat(run.id, attempt=1)
            numbers = [attempt.number for attempt in await runs.alist_attempts(run.id)]
            assert numbers == [1, 2]
            stored = await runs.aget(run.id)
            assert stored is not None
            assert (stored.status, stored.outputs) == ("running", 1)
            assert ids(await runs.alist_runs(status="running")) == [run.id]
            assert ids(await runs.alist_by_workflow("contract")) == [run.id]
            assert [found.id async for found in runs.aiter_runs()] == [run.id]
            assert await runs.acount_runs(status="failed") == 0
            copied = new_run(id="copied")
            await runs.aput(copied)
            await runs.aput(copied, over=copied)
            await runs.adelete_unchanged(copied, None)
            await runs.aupdate_status(run.id, "completed")
            assert await runs.adelete_finished(before=timezone.now()) == 1
            with pytest.raises(RunNotFoundError):
                await runs.adelete(run.id)

        async_to_sync(use)()

    def test_every_async_twin_of_the_states_does_the_same(self, backend: StorageBackend) -> None:
        states = backend.states
        run = stored_run(backend)

        async def use() -> None:
            for number in range(3):
                assert await states.asave_state(run.id, {"n": number}, "node") == number
            latest = await states.aget_latest_checkpoint(run.id)
            assert latest is not None
            assert latest["step"] == 2
            assert await states.aget_latest_state(run.id) == {"n": 2}
            assert await states.aget_state(run.id, 2) == latest
            history = await states.aget_state_history(run.id)
            assert [checkpoint["step"] for checkpoint in history] == [0, 1, 2]
            assert [found async for found in states.aiter_state_history(run.id)] == history
            assert await states.writer(run.id).asave_state({"n": 3}, "node") == 3
            assert await states.adelete_states(run.id, keep_last=1) == 3
            at = timezone.now()
            last = [Checkpoint(step=4, node_id="node", state_data={}, created_at=at)]
            assert await states.aappend(run.id, last) == 1
            last[0]["step"] = 5
            assert await states.writer(run.id).aappend(last) == 1
            for save in (
                functools.partial(states.asave_state, run.id, attempt=1),
                states.writer(run.id, attempt=1).asave_state,
            ):
                with pytest.raises(RunLostError):
                    await save({}, "node", totals={"total_tokens": 1}, tokens=1)
            step = await states.asave_state(
                run.id, {}, "node", totals={"total_tokens": 1}, cost_usd=0.5
            )
            saved = await states.aget_state(run.id, step)
            assert saved is not None
            assert saved["cost_usd"] == 0.5

        async_to_sync(use)()

    def test_async_calls_that_run_at_once_do_not_mix(self, backend: StorageBackend) -> None:
        async def one_run(number: int) -> tuple[Any, Any]:
            run = new_run(inputs=number)
            await backend.runs.aadd(run)
            for step in range(3):
                await backend.states.asave_state(run.id, {"run": number, "step": step}, "node")
            stored = await backend.runs.aget(run.id)
            assert stored is not None
            return stored.inputs, await backend.states.aget_latest_state(run.id)

        async def use() -> list[tuple[Any, Any]]:
            try:
                return await asyncio.gather(*(one_run(number) for number in range(20)))
            finally:
                await sync_to_async(connections.close_all)()

        expected = [(number, {"run": number, "step": 2}) for number in range(20)]
        assert asyncio.run(use()) == expected

    def test_every_method_has_an_async_twin_with_its_signature(
        self, backend: StorageBackend
    ) -> None:
        writer = backend.states.writer(stored_run(backend).id)
        flaws = [
            *flaws_of_twins("runs", backend.runs, AbstractWorkflowRunRepository),
            *flaws_of_twins("states", backend.states, AbstractExecutionStateRepository),
            *flaws_of_twins("states.writer(run_id)", writer, StateWriter),
        ]

        assert not flaws, "\n".join(flaws)
