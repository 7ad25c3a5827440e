"""The runs in a Django database."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Unpack

from django.db import DEFAULT_DB_ALIAS, IntegrityError
from django.utils import timezone

from workflow_storage.attempts import (
    FoundRun,
    StatusChange,
    ended_attempt,
    refusal,
    status_change,
)
from workflow_storage.backends.orm.compiled_queries import delete_rows
from workflow_storage.backends.orm.conditions import (
    Condition,
    conditions_of,
    in_attempt,
    in_status,
    order_of,
    values_of,
    with_parameters,
    with_values,
)
from workflow_storage.backends.orm.deleting import Deletion, FinishedRuns, Place
from workflow_storage.backends.orm.errors import (
    Patience,
    conflict,
    operation,
    reading,
    translates_errors,
    tries_again,
)
from workflow_storage.backends.orm.repository import DjangoRepository
from workflow_storage.backends.orm.run_rows import RunRows
from workflow_storage.backends.orm.summarizing import summarized
from workflow_storage.base import (
    AbstractWorkflowRunRepository,
    Attempt,
    Checkpoint,
    FinishedRunFilters,
    RunFilters,
    stalled_message,
)
from workflow_storage.exceptions import (
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    SnapshotError,
    StorageError,
)
from workflow_storage.filters import valid_filters, valid_finished
from workflow_storage.models import WorkflowRun
from workflow_storage.paging import PageLength, emptied
from workflow_storage.status import RunStatus
from workflow_storage.summaries import RunSummary, valid_groups
from workflow_storage.validation import (
    MAX_NODE_ID,
    equal_runs,
    is_possible_id,
    label_change,
    plain_text,
    run_fields,
    valid_attempt,
    valid_count,
    valid_expected,
    valid_fields,
    valid_name,
    valid_new_run,
    valid_status,
    valid_updates,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime, timedelta

    from django.db.models import QuerySet

    from workflow_storage.backends.orm.async_threads import AsyncThreads

# SQLite takes at most 32,766 parameters in a statement.
MAX_BATCH = 10_000

TRIES = 3
"""How often a change is tried that finds no run as it has to be, though one is there after it:
somebody has committed it in between."""

STALLED_BATCH = 100
"""Runs that `fail_stalled` locks at a time."""


class DjangoWorkflowRunRepository(DjangoRepository, AbstractWorkflowRunRepository):
    """The runs in a Django database.

    The models' signals (pre_save, post_save) are not sent, as with `bulk_create`.

    Args:
        alias: the database's name in DATABASES.
        own_connection: see `DjangoRepository`.
        threads: see `DjangoRepository`.
    """

    def __init__(
        self,
        alias: str = DEFAULT_DB_ALIAS,
        *,
        own_connection: bool = False,
        threads: AsyncThreads | None = None,
    ) -> None:
        super().__init__(alias, own_connection=own_connection, threads=threads)
        self._rows = RunRows(alias)

    @operation
    def add(self, run: WorkflowRun) -> None:
        """See `AbstractWorkflowRunRepository.add`."""
        fields = valid_new_run(run_fields(run))
        self._insert(fields)
        for name, value in fields.items():
            setattr(run, name, value)
        run._state.adding = False
        run._state.db = self.alias

    def _insert(self, fields: dict[str, Any], attempts: Iterable[Attempt] = ()) -> None:
        patience = Patience(time.monotonic())
        while True:
            try:
                self._rows.insert(fields, attempts)
                return
            except IntegrityError as exc:
                if self._rows.found(fields["id"]) is not None:
                    raise RunAlreadyExistsError(fields["id"]) from exc
                # Whoever had the id has been deleted since, or this transaction cannot see it.
                if self._rows.has_snapshot:
                    raise conflict(self.alias, exc) from exc
                if not patience.pause():
                    raise

    @reading
    def get(self, run_id: str) -> WorkflowRun | None:
        """See `AbstractWorkflowRunRepository.get`."""
        if not is_possible_id(run_id):
            return None
        return next(
            iter(
                self._rows.run_queries.objects("get", self._rows.the_run, keyed=True, run_id=run_id)
            ),
            None,
        )

    @reading
    def list_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_runs`."""
        valid_count("limit", limit)
        valid = self._rows.rarest_first(valid_filters(filters))
        position = None if before is None else self._position(before)
        conditions = conditions_of(valid, position)
        if limit == 0 or valid.match_none:
            return []

        def page() -> QuerySet[WorkflowRun]:
            runs = with_parameters(self._rows.runs, conditions)
            return runs.order_by(*order_of(valid))[:limit]

        return self._rows.run_queries.objects(
            ("list", limit, *(condition.key for condition in conditions)),
            page,
            keyed=False,
            **values_of(conditions),
        )

    @reading
    def list_ids(self, beginning: str, *, limit: int = 10) -> list[str]:
        """See `AbstractWorkflowRunRepository.list_ids`."""
        valid_count("limit", limit)
        if beginning and not is_possible_id(beginning):
            return []
        # Ids are compared byte for byte, so that those that begin alike come one after another.
        following = self._rows.runs.filter(pk__gte=plain_text(beginning)).order_by("pk")
        ids = following.values_list("pk", flat=True)[:limit]
        return [run_id for run_id in ids if run_id.startswith(beginning)]

    @reading
    def count_runs(self, **filters: Unpack[RunFilters]) -> int:
        """See `AbstractWorkflowRunRepository.count_runs`."""
        valid = valid_filters(filters)
        if valid.match_none:
            return 0
        if valid.is_one_label:  # which the index over the labels knows alone
            return self._rows.labelled(valid).count()
        return with_values(self._rows.runs, conditions_of(valid)).count()

    @reading
    def summarize(
        self, *, by: str | Iterable[str] = ("workflow_name",), **filters: Unpack[RunFilters]
    ) -> list[RunSummary]:
        """See `AbstractWorkflowRunRepository.summarize`."""
        groups, valid = valid_groups(by), valid_filters(filters)
        if valid.match_none:
            return []
        runs = with_values(self._rows.runs, conditions_of(valid))
        return summarized(runs, groups, valid)

    async def asummarize(
        self, *, by: str | Iterable[str] = ("workflow_name",), **filters: Unpack[RunFilters]
    ) -> list[RunSummary]:
        """Async twin of `summarize`."""
        return await self.in_thread(self.summarize, by=by, **filters)

    @operation
    def update(self, run_id: str, *, attempt: int | None = None, **fields: Any) -> None:
        """See `AbstractWorkflowRunRepository.update`."""
        of_labels = label_change(fields)
        changes = valid_updates(fields)
        valid_attempt(attempt)
        statuses = None if attempt is None else _RUNNING
        if of_labels is not None:
            with self._rows.read_committed():
                self._rows.lock_run(run_id)
                changes["labels"] = of_labels.applied(self._rows.labels_of(run_id))
                self._change(run_id, changes, statuses, attempt)
            return
        if changes:
            self._change(run_id, changes, statuses, attempt)
            return
        found = self._rows.found(run_id)
        if found is None or not _meets(found, statuses, attempt):
            raise self._refusal(run_id, found, attempt)

    @operation
    def update_status(
        self,
        run_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        attempt: int | None = None,
        **fields: Any,
    ) -> None:
        """See `AbstractWorkflowRunRepository.update_status`."""
        change = status_change(valid_status(status), fields)
        valid_attempt(attempt)
        given = None if expected is None else valid_expected(expected)
        statuses = _RUNNING if given is None and attempt is not None else given
        for _ in range(TRIES):
            is_done, found = self._change_status(run_id, change, statuses, attempt)
            if is_done:
                return
            if found is None or not _meets(found, statuses, attempt):
                break
        error = refusal(run_id, found, expected=given, attempt=attempt, change=change)
        if error is not None:
            raise error

    def _change_status(
        self,
        run_id: str,
        change: StatusChange,
        statuses: Iterable[RunStatus] | None,
        attempt: int | None,
    ) -> tuple[bool, FoundRun | None]:
        """Change the status of a run; say whether that is done, and what the run is if it is not."""
        rows = self._rows
        # The rule is that no attempt is kept; that takes one statement.
        by_keeping = {before: change.ends_attempt(before) for before in statuses or RunStatus}
        simple = [before for before, keeps in by_keeping.items() if not keeps]
        may_keep = len(simple) < len(by_keeping)
        takes_over = may_keep and change.is_beginning
        at_once = _conditions(simple, attempt)
        if simple and not takes_over and rows.change_status(run_id, change, at_once):
            return True, None
        if not may_keep:
            return False, rows.found(run_id)
        with rows.taking_over([run_id]) if takes_over else rows.transaction():
            found = rows.found(run_id, with_lock=True)
            if found is None or not _meets(found, statuses, attempt):
                return False, found
            if found.attempt and change.ends_attempt(found.status):
                rows.insert_attempts(plain_text(run_id), [ended_attempt(found, change)])
            return rows.change_status(run_id, change, _conditions(statuses, attempt)), found

    @operation
    def heartbeat(
        self, run_id: str, *, attempt: int | None = None, node: str | None = None
    ) -> None:
        """See `AbstractWorkflowRunRepository.heartbeat`."""
        valid_attempt(attempt)
        changes: dict[str, Any] = {"heartbeat_at": timezone.now()}
        if node is not None:
            changes["current_node"] = valid_name("node", node, MAX_NODE_ID)
        self._change(run_id, changes, None if attempt is None else _RUNNING, attempt)

    def _change(
        self,
        run_id: str,
        changes: dict[str, Any],
        statuses: Iterable[RunStatus] | None,
        attempt: int | None,
    ) -> None:
        """Change fields of a run that is in one of some statuses and in an attempt."""
        conditions = _conditions(statuses, attempt)
        for _ in range(TRIES):
            if self._rows.change(run_id, changes, conditions):
                return
            found = self._rows.found(run_id)
            if found is None or not _meets(found, statuses, attempt):
                break
        raise self._refusal(run_id, found, attempt)

    @reading
    def list_attempts(self, run_id: str) -> list[Attempt]:
        """See `AbstractWorkflowRunRepository.list_attempts`."""
        # As the caller sees it, and without a lock, as its attempts.
        row = next(iter(self._rows.run(run_id).values_list(*FoundRun._fields)), None)
        if row is None:
            raise RunNotFoundError(run_id)
        return FoundRun(*row).with_attempts(self._rows.attempts_of(plain_text(run_id)))

    @operation
    def delete(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.delete`."""
        with self._rows.read_committed():
            self._rows.lock_run(run_id, to_delete=True)
            self._rows.delete([plain_text(run_id)])

    @translates_errors
    def delete_finished(
        self,
        *,
        batch_size: int = 1000,
        on_batch: Callable[[int], object] | None = None,
        **which: Unpack[FinishedRunFilters],
    ) -> int:
        """See `AbstractWorkflowRunRepository.delete_finished`."""
        valid = valid_finished(which)
        size = min(valid_count("batch_size", batch_size, minimum=1), MAX_BATCH)
        return Deletion(self._rows, valid, size, on_batch).carry_out()

    def iter_finished(self, **which: Unpack[FinishedRunFilters]) -> Iterator[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.iter_finished`."""
        valid = valid_finished(which)
        finished, length = FinishedRuns(self._rows, valid), PageLength()
        left, last = valid.limit, None
        while left and (page := self._finished_page(finished, last, length.runs)):
            last = Place.of(page[-1])
            length.after(page)
            for run in emptied(page):
                if left and not self._is_spared(finished, run):
                    left -= 1
                    yield run

    @reading
    def _finished_page(
        self, finished: FinishedRuns, after: Place | None, size: int
    ) -> list[WorkflowRun]:
        return list(finished.after(after)[:size])

    @reading
    def _is_spared(self, finished: FinishedRuns, run: WorkflowRun) -> bool:
        return finished.spares(Place.of(run))

    @reading
    def list_stalled(
        self,
        idle: timedelta,
        *,
        before: str | WorkflowRun | None = None,
        limit: int | None = None,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_stalled`."""
        # Few runs are running, and they are in the order of their own start.
        valid = valid_filters(filters)._replace(by_label=False)
        position = None if before is None else self._position(before)
        most = None if limit is None else valid_count("limit", limit)
        stalled = self._rows.stalled(idle)
        if valid.match_none:
            return []
        runs = with_values(stalled, conditions_of(valid, position))
        return list(runs.order_by(*order_of(valid))[:most])

    @translates_errors
    def fail_stalled(self, idle: timedelta, *, run_id: str | None = None) -> int:
        """See `AbstractWorkflowRunRepository.fail_stalled`."""
        stalled = self._rows.stalled(idle)
        if run_id is not None:
            if not is_possible_id(run_id):
                return 0
            stalled = stalled.filter(pk=plain_text(run_id))
        run_ids = self._ids_to_fail(stalled)
        return sum(
            self._fail_batch(run_ids[first : first + STALLED_BATCH], idle)
            for first in range(0, len(run_ids), STALLED_BATCH)
        )

    @tries_again
    def _ids_to_fail(self, stalled: QuerySet[WorkflowRun]) -> list[str]:
        if self._rows.has_snapshot:
            raise SnapshotError
        return list(stalled.order_by("pk").values_list("pk", flat=True))

    @tries_again
    def _fail_batch(self, run_ids: list[str], idle: timedelta) -> int:
        """Fail those of some runs that are still stalled once they are locked."""
        change = status_change(RunStatus.FAILED, {"error_message": stalled_message(idle)})
        with self._rows.taking_over(run_ids):
            return sum(
                self._rows.change_status(run_id, change, _conditions(_RUNNING, None))
                for run_id in self._rows.lock_stalled(run_ids, idle)
            )

    @operation
    def put(
        self,
        run: WorkflowRun,
        *,
        over: WorkflowRun | None = None,
        attempts: Iterable[Attempt] = (),
    ) -> None:
        """See `AbstractWorkflowRunRepository.put`."""
        fields = valid_fields(run_fields(run))
        ended = FoundRun.of(fields).attempts_to_keep(attempts)
        if over is None:
            self._insert(fields, ended)
            return
        with self._rows.read_committed():
            self._rows.lock_run(run.id)
            self._refuse_if_changed(run.id, over)
            self._rows.runs.filter(pk=fields.pop("id")).update(**fields)
            self._rows.replace_labels(run.id, fields["labels"])
            delete_rows(self._rows.attempts.filter(run_id=run.id))
            self._rows.insert_attempts(run.id, ended)

    @operation
    def delete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> None:
        """See `AbstractWorkflowRunRepository.delete_unchanged`."""
        with self._rows.read_committed():
            self._rows.lock_run(run.id, to_delete=True)
            self._refuse_if_changed(run.id, run)
            states = self._rows.with_lock(self._rows.states.filter(run_id=run.id).order_by("-step"))
            newest = states.values_list("step", "node_id", "created_at").first()
            if newest != (last and (last["step"], last["node_id"], last["created_at"])):
                raise RunChangedError(run.id)
            self._rows.delete([run.id])

    def _refuse_if_changed(self, run_id: str, as_read: WorkflowRun) -> None:
        # A plain read can be of a snapshot from before the lock (REPEATABLE READ).
        stored = self._rows.with_lock(self._rows.runs.filter(pk=run_id)).first()
        if stored is None:
            raise RunNotFoundError(run_id)
        if not equal_runs(stored, as_read):
            raise RunChangedError(run_id)

    def _position(self, before: str | WorkflowRun) -> tuple[datetime, str]:
        if isinstance(before, WorkflowRun):
            return before.started_at, before.id
        for started_at in self._rows.run(before).values_list("started_at", flat=True):
            return started_at, plain_text(before)
        raise RunNotFoundError(before)

    def _refusal(self, run_id: str, found: FoundRun | None, attempt: int | None) -> StorageError:
        return refusal(run_id, found, attempt=attempt) or RunNotFoundError(run_id)


_RUNNING = frozenset({RunStatus.RUNNING})


def _conditions(statuses: Iterable[RunStatus] | None, attempt: int | None) -> list[Condition]:
    conditions = [] if statuses is None else [in_status(sorted(statuses))]
    return conditions if attempt is None else [*conditions, in_attempt(attempt)]


def _meets(found: FoundRun, statuses: Iterable[str] | None, attempt: int | None) -> bool:
    return (statuses is None or found.status in set(statuses)) and attempt in (None, found.attempt)
