"""One Django database as the repositories see it: both tables, and how rows are locked there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.db.models import F, Model, QuerySet

from workflow_storage.backends.orm.compiled_queries import Parameter, Queries
from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.exceptions import RunNotFoundError
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.validation import is_possible_id, plain_text

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

_M = TypeVar("_M", bound=Model)

RUN_ID = Parameter("run_id", WorkflowRun._meta.get_field("id"))
"""The id of a run in a compiled query."""


class Database:
    """A database that holds the tables: its queries and its locks.

    Attributes:
        alias: its name in DATABASES.
        run_queries: compiled queries on the runs.
        state_queries: compiled queries on the states.
    """

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.run_queries = Queries(WorkflowRun, alias)
        self.state_queries = Queries(ExecutionState, alias)

    @property
    def connection(self) -> BaseDatabaseWrapper:
        """The connection of this thread."""
        return connections[self.alias]

    @property
    def in_transaction(self) -> bool:
        """Whether the caller has a transaction open."""
        return self.connection.in_atomic_block

    @property
    def runs(self) -> QuerySet[WorkflowRun]:
        """All runs."""
        return WorkflowRun._base_manager.using(self.alias)

    @property
    def states(self) -> QuerySet[ExecutionState]:
        """All states."""
        return ExecutionState._base_manager.using(self.alias)

    def the_run(self) -> QuerySet[WorkflowRun]:
        """Return the run whose id is the parameter `RUN_ID`."""
        return self.runs.filter(pk=RUN_ID)

    def its_states(self) -> QuerySet[ExecutionState]:
        """Return the states of that run."""
        return self.states.filter(run_id=RUN_ID)

    def run(self, run_id: str) -> QuerySet[WorkflowRun]:
        """Return the run with an id, or nothing if there can be none."""
        return (
            self.runs.filter(pk=plain_text(run_id)) if is_possible_id(run_id) else self.runs.none()
        )

    def states_of(self, run_id: str) -> QuerySet[ExecutionState]:
        """Return the states of the run with an id, or nothing if there can be none."""
        if not is_possible_id(run_id):
            return self.states.none()
        return self.states.filter(run_id=plain_text(run_id))

    def transaction(self) -> AbstractContextManager[Any]:
        """Begin a transaction, or a savepoint in the caller's."""
        return transaction.atomic(using=self.alias)

    def one_statement(self) -> AbstractContextManager[Any]:
        """Keep the caller's transaction usable if the one statement inside fails."""
        return self.transaction() if self.in_transaction else nullcontext()

    def with_lock(self, rows: QuerySet[_M], *, no_key: bool = False) -> QuerySet[_M]:
        """Let a query lock the rows that it reads, where the database locks rows.

        Args:
            rows: what it reads.
            no_key: whether others may still insert rows that refer to them.
        """
        features = self.connection.features
        if not features.has_select_for_update:
            return rows
        return rows.select_for_update(no_key=no_key and features.has_select_for_no_key_update)

    def lock_run(self, run_id: str, *, to_delete: bool = False) -> None:
        """Make this transaction the only one to change a run until it ends.

        Args:
            run_id: which run.
            to_delete: whether to keep others from inserting states of the run, too.

        Raises:
            RunNotFoundError: if there is no such run.
        """
        run = self.run(run_id)
        if self.connection.features.has_select_for_update:
            found = bool(self.with_lock(run, no_key=not to_delete).values_list("pk"))
        else:
            self.begin_writing()
            found = run.exists()
        if not found:
            raise RunNotFoundError(run_id)

    def begin_writing(self) -> None:
        """Let a transaction lock the whole database now, where that is how it is locked.

        A transaction on a SQLite file that has read cannot write once another one has.
        """
        if dialect_of(self.connection).begins_deferred(self.connection):
            self.runs.filter(pk="").update(status=F("status"))


class DjangoRepository:
    """What both repositories know: their database.

    Attributes:
        alias: its name in DATABASES.
    """

    def __init__(self, alias: str = DEFAULT_DB_ALIAS) -> None:
        self.alias = alias

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.alias!r})"
