"""What the repositories on the ORM share: their database, its locks, their parameters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.db.models import (
    F,
    QuerySet,
)

from workflow_storage.backends.compiled import Parameter, Queries
from workflow_storage.exceptions import (
    RunNotFoundError,
)
from workflow_storage.models import (
    ExecutionState,
    WorkflowRun,
)
from workflow_storage.validation import plain_text, possible_id


class DjangoRepository:
    """What both repositories know: their database, and how to read and write it."""

    def __init__(self, alias: str = DEFAULT_DB_ALIAS) -> None:
        self.alias = alias
        self._run_queries = Queries(WorkflowRun, alias)
        self._state_queries = Queries(ExecutionState, alias)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.alias!r})"

    @property
    def _runs(self) -> QuerySet[WorkflowRun]:
        return WorkflowRun._base_manager.using(self.alias)

    @property
    def _states(self) -> QuerySet[ExecutionState]:
        return ExecutionState._base_manager.using(self.alias)

    def _the_run(self) -> QuerySet[WorkflowRun]:
        """The run whose id is the parameter run_id."""
        return self._runs.filter(pk=RUN_ID)

    def _its_states(self) -> QuerySet[ExecutionState]:
        """The states of that run."""
        return self._states.filter(run_id=RUN_ID)

    def _one_statement(self) -> AbstractContextManager[Any]:
        """Keep the caller's transaction usable if the one statement inside fails."""
        if connections[self.alias].in_atomic_block:
            return transaction.atomic(using=self.alias)
        return nullcontext()

    def _locked(
        self, runs: QuerySet[WorkflowRun], *, to_delete: bool = False
    ) -> QuerySet[WorkflowRun]:
        """Let the query lock the rows that it reads, where the database locks rows.

        The lock for deleting keeps others from inserting states of the run; the weaker one
        lets them.
        """
        features = connections[self.alias].features
        if not features.has_select_for_update:
            return runs
        no_key = features.has_select_for_no_key_update and not to_delete
        return runs.select_for_update(no_key=no_key)

    def _lock(self, run_id: str, *, to_delete: bool = False) -> None:
        """Make this transaction the only one to change a run until it ends; see `_locked`.

        Raises:
            RunNotFoundError: if there is no such run.
        """
        runs = self._runs.none()
        if possible_id(run_id):
            runs = self._runs.filter(pk=plain_text(run_id))
        if connections[self.alias].features.has_select_for_update:
            found = bool(self._locked(runs, to_delete=to_delete).values_list("pk"))
        else:
            self._begin_writing()
            found = runs.exists()
        if not found:
            raise RunNotFoundError(run_id)

    def _begin_writing(self) -> None:
        """Let a transaction on a SQLite file lock it now, if it did not when it began.

        A transaction that has read cannot write once another one has.
        """
        connection = connections[self.alias]
        options = connection.settings_dict["OPTIONS"]
        if connection.vendor == "sqlite" and not begins_immediately(options):
            self._runs.filter(pk="").update(status=F("status"))


RUN_ID = Parameter("run_id", WorkflowRun._meta.get_field("id"))
_FIELD_OF = {
    "started_after": "started_at",
    "started_before": "started_at",
    "before_started_at": "started_at",
    "before_id": "id",
}


def parameter(name: str) -> Parameter:
    """Give the parameter for one of the values that `_checked` names, or for a step."""
    if name.startswith("step_"):
        return Parameter(name, ExecutionState._meta.get_field("step"))
    field = "status" if name.startswith("status_") else _FIELD_OF.get(name, name)
    return Parameter(name, WorkflowRun._meta.get_field(field))


def begins_immediately(options: dict[str, Any]) -> bool:
    """Whether transactions on a SQLite database with these OPTIONS lock it when they begin."""
    return str(options.get("transaction_mode")).upper() in {"IMMEDIATE", "EXCLUSIVE"}
