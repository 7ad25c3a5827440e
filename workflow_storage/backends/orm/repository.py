"""One Django database as the repositories see it: both tables, and how rows are locked there."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from django.db import DEFAULT_DB_ALIAS, OperationalError, transaction
from django.db.models import F, Model, QuerySet
from django.db.models.expressions import Expression

from workflow_storage.attempts import FoundRun
from workflow_storage.backends.orm.async_threads import AsyncThreads
from workflow_storage.backends.orm.compiled_queries import Parameter, Queries
from workflow_storage.backends.orm.conditions import Condition, values_of, with_parameters
from workflow_storage.backends.orm.connections import connection_of, in_callers_transaction
from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.backends.orm.forks import watch_database
from workflow_storage.base import HasAsyncTwins
from workflow_storage.exceptions import RunNotFoundError, StorageUnavailableError
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.validation import is_possible_id, plain_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper

_M = TypeVar("_M", bound=Model)
_P = ParamSpec("_P")
_T = TypeVar("_T")

TAKEOVER_TIMEOUT = 10.0
"""Seconds that a takeover waits for a worker that is in the middle of a transaction."""

LOOKS = 2
"""How often a run is looked up that is to be locked. A statement of PostgreSQL that waits for whoever
deletes the run does not see that it was added anew with that."""

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
        watch_database(alias)
        self.run_queries = Queries(WorkflowRun, alias)
        self.state_queries = Queries(ExecutionState, alias)

    @property
    def connection(self) -> BaseDatabaseWrapper:
        """The connection of this thread."""
        return connection_of(self.alias)

    @property
    def in_transaction(self) -> bool:
        """Whether the caller has a transaction open."""
        return in_callers_transaction(self.connection)

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
        connection = self.connection
        if not connection.in_atomic_block and in_callers_transaction(connection):
            dialect_of(connection).begin_callers(connection)
        return transaction.atomic(using=self.alias)

    def read_committed(self) -> AbstractContextManager[Any]:
        """Begin a transaction of which each statement sees what is committed by then.

        In the caller's transaction it is a savepoint, and what is seen there is the caller's to
        say; see `has_snapshot`.
        """
        connection = self.connection
        if in_callers_transaction(connection):
            return self.transaction()
        return dialect_of(connection).read_committed(connection)

    @property
    def has_snapshot(self) -> bool:
        """Whether the caller has a transaction open that cannot see what others commit."""
        connection = self.connection
        if not in_callers_transaction(connection):
            return False
        return dialect_of(connection).has_snapshot(connection)

    def check_references(self, model: type[Model]) -> None:
        """Check now what refers to the rows of a model, rather than when the caller commits.

        Raises:
            IntegrityError: if a row refers to one that was deleted.
        """
        dialect_of(self.connection).check_references(self.connection, model._meta.db_table)

    @contextmanager
    def taking_over(self, run_ids: Sequence[str]) -> Iterator[None]:
        """Begin a transaction, or a savepoint, that takes runs from whoever works on them.

        Raises:
            StorageUnavailableError: if somebody holds a lock on one for longer than
                `TAKEOVER_TIMEOUT`.
        """
        dialect = dialect_of(self.connection)
        try:
            with dialect.impatient(self.connection, TAKEOVER_TIMEOUT, self.read_committed()):
                yield
        except OperationalError as exc:
            if not dialect.is_lock_timeout(exc):
                raise
            which = f"run {run_ids[0]}" if len(run_ids) == 1 else f"one of {len(run_ids)} runs"
            raise StorageUnavailableError(
                f"Whoever works on workflow {which} has been in the middle of a transaction for "
                f"more than {TAKEOVER_TIMEOUT:g} seconds, and is perhaps stopped: it holds a lock, "
                "so that nobody else can take over. End that process, or its session in the "
                "database, and try again."
            ) from exc

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

    def as_of_now(self, rows: QuerySet[_M]) -> QuerySet[_M]:
        """Let a query see what is committed by now, if only a lock does in this transaction."""
        connection = self.connection
        if in_callers_transaction(connection) and dialect_of(connection).locks_see_newest:
            return self.with_lock(rows)
        return rows

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
            locking = self.with_lock(run, no_key=not to_delete)
            found = any(locking.values_list("pk") for _ in range(LOOKS))
        else:
            self.begin_writing()
            found = run.exists()
        if not found:
            raise RunNotFoundError(run_id)

    def change_run(self, run_id: str) -> None:
        """Do what `lock_run` does, and let a save that waits for the lock notice.

        That is needed where a save is one statement, which goes on with what it saw before it waited.

        Raises:
            RunNotFoundError: if there is no such run.
        """
        if not dialect_of(self.connection).updates_within:
            self.lock_run(run_id)
        elif not any(self.run(run_id).update(status=F("status")) for _ in range(LOOKS)):
            raise RunNotFoundError(run_id)

    def begin_writing(self) -> None:
        """Let a transaction lock the whole database now, where that is how it is locked.

        A transaction on a SQLite file that has read cannot write once another one has.
        """
        if dialect_of(self.connection).begins_deferred(self.connection):
            self.runs.filter(pk="").update(status=F("status"))

    def found(self, run_id: str, *, with_lock: bool = False) -> FoundRun | None:
        """Return what a run is now, if it is there.

        Args:
            run_id: which run.
            with_lock: whether nobody else is to change it until the transaction ends.
        """
        if with_lock:
            self.begin_writing()
        runs = self.run(run_id)
        runs = self.with_lock(runs, no_key=True) if with_lock else self.as_of_now(runs)
        for _ in range(LOOKS if with_lock else 1):
            for row in runs.values_list(*FoundRun._fields):
                return FoundRun(*row)
        return None

    def update_run(
        self,
        run_id: str,
        changes: Mapping[str, Any],
        conditions: Sequence[Condition] = (),
        **parameters: Any,
    ) -> bool:
        """Change columns of a run if it meets some conditions, in one statement.

        If the statement can fail, have it in `one_statement` or in a transaction of our own.

        Args:
            run_id: which run.
            changes: the columns, each with its value or an expression; a column has always the
                same expression, if it has one.
            conditions: what has to be so.
            **parameters: values of the parameters in the expressions.

        Returns:
            Whether it was changed.
        """
        if not is_possible_id(run_id):
            return False
        computed = [name for name, change in changes.items() if isinstance(change, Expression)]
        values = {name: change for name, change in changes.items() if name not in computed}

        def the_run() -> QuerySet[WorkflowRun]:
            return with_parameters(self.runs, conditions).filter(pk=RUN_ID)

        def columns() -> Iterator[tuple[str, Expression]]:
            # MySQL assigns from left to right, and an expression reads what was there before.
            yield from ((name, changes[name]) for name in computed)
            yield from ((name, _column(name)) for name in values)

        return bool(
            self.run_queries.update(
                ("update", *changes, len(computed), *(condition.key for condition in conditions)),
                the_run,
                columns,
                run_id=run_id,
                **parameters,
                **values,
                **values_of(conditions),
            )
        )


def _column(name: str) -> Parameter:
    return Parameter(name, WorkflowRun._meta.get_field(name), for_save=True)


class DjangoRepository(HasAsyncTwins):
    """What both repositories know: their database.

    Args:
        alias: its name in DATABASES.
        own_connection: whether they use a connection of their own, which no transaction of the
            caller is on.
        threads: where the async methods run.

    Attributes:
        alias: as above.
        own_connection: as above.
    """

    def __init__(
        self,
        alias: str = DEFAULT_DB_ALIAS,
        *,
        own_connection: bool = False,
        threads: AsyncThreads | None = None,
    ) -> None:
        self.alias = alias
        self.own_connection = own_connection
        self._threads = threads or AsyncThreads(alias, own_connection=own_connection)

    async def in_thread(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what a call returns that is carried out in one of the threads."""
        return await self._threads.run(call, *args, **kwargs)

    def from_any_thread(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what a call returns; see `AsyncThreads.call`."""
        return self._threads.call(call, *args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.alias!r})"
