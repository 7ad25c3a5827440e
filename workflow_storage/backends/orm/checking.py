"""Whether the tables are those of this version, and the labels equal to their index; for `check_runs`."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from django.db import DEFAULT_DB_ALIAS
from django.db.migrations.executor import MigrationExecutor
from django.db.models import F
from django.db.models.lookups import In

from workflow_storage.backends.orm.compiled_queries import Parameter, Queries
from workflow_storage.backends.orm.conditions import conditions_of, order_of, with_values
from workflow_storage.backends.orm.errors import operation, reading
from workflow_storage.backends.orm.repository import DjangoRepository
from workflow_storage.backends.orm.run_rows import RunRows
from workflow_storage.base import Damage
from workflow_storage.exceptions import StorageError, StorageUnavailableError
from workflow_storage.models import (
    ExecutionState,
    WorkflowRun,
    WorkflowRunAttempt,
    WorkflowRunLabel,
)
from workflow_storage.validation import RUN_FIELDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from django.db.models import Model, QuerySet

    from workflow_storage.backends.orm.async_threads import AsyncThreads
    from workflow_storage.filters import ValidFilters

_MODELS: tuple[type[Model], ...] = (
    WorkflowRun,
    ExecutionState,
    WorkflowRunLabel,
    WorkflowRunAttempt,
)

_Rows = dict[str, tuple[str, "datetime"]]
"""The rows of the labels of a run: name -> text and start."""


class DatabaseCheck(DjangoRepository):
    """Looks at the tables behind the repositories.

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
        self._labels = Queries(WorkflowRunLabel, alias)

    @reading
    def tables(self) -> list[Damage]:
        """Return where the tables are not as this version makes them."""
        connection = self._rows.connection
        executor = MigrationExecutor(connection)
        leaves = executor.loader.graph.leaf_nodes("workflow_storage")
        damages = [
            Damage(None, f"the migration {migration.name} has not been applied")
            for migration, _ in executor.migration_plan(leaves)
            if migration.app_label == "workflow_storage"
        ]
        with connection.cursor() as cursor:
            for model in _MODELS:
                table = model._meta.db_table
                there = connection.introspection.get_constraints(cursor, table)
                wanted = [*model._meta.indexes, *model._meta.constraints]
                damages += [
                    Damage(None, f"the table {table} has no {one.name}")
                    for one in wanted
                    if one.name not in there
                ]
        return damages

    @reading
    def newest_ids(
        self, filters: ValidFilters, before: WorkflowRun | None, limit: int
    ) -> list[str]:
        """Return the ids of the runs that filters mean, newest first, reading nothing else of them."""
        if filters.match_none:
            return []
        filters = self._rows.rarest_first(filters)
        position = None if before is None else (before.started_at, before.id)
        runs = with_values(self._rows.runs, conditions_of(filters, position))
        return list(runs.order_by(*order_of(filters)).values_list("pk", flat=True)[:limit])

    def known_fields(self, run_id: str) -> dict[str, Any]:
        """Return those fields of a run that can be read."""
        fields = {}
        for name in RUN_FIELDS:
            try:
                for value in self._values(run_id, name):
                    fields[name] = value
            except StorageUnavailableError:
                raise
            except (StorageError, ArithmeticError, TypeError, ValueError):
                pass  # that field is the damaged one, or one of them
        return fields

    @reading
    def _values(self, run_id: str, name: str) -> list[Any]:
        return list(self._rows.run(run_id).values_list(name, flat=True))

    def labels(self, runs: Sequence[WorkflowRun], *, repair: bool) -> list[Damage]:
        """Return which of some runs have other labels than their rows say."""
        if not runs:
            return []
        rows = self._label_rows([run.id for run in runs])
        return [
            Damage(run.id, "its labels are not those of their index", repair)
            for run in runs
            if rows[run.id] != _expected(run) and self._differs(run.id, repair=repair)
        ]

    @reading
    def _label_rows(self, run_ids: list[str]) -> defaultdict[str, _Rows]:
        found: defaultdict[str, _Rows] = defaultdict(dict)
        ids = {f"run_{number}": run_id for number, run_id in enumerate(run_ids)}

        def rows() -> QuerySet[WorkflowRunLabel, Any]:
            field = WorkflowRunLabel._meta.get_field("run")
            wanted = In(F("run_id"), [Parameter(name, field) for name in ids])
            labels = self._rows.labels.filter(wanted)
            return labels.values_list("run_id", "name", "value", "started_at")

        key = ("labels", len(run_ids))
        for run_id, name, value, started_at in self._labels.rows(key, rows, keyed=False, **ids):
            found[run_id][name] = (value, started_at)
        return found

    @operation
    def _differs(self, run_id: str, *, repair: bool) -> bool:
        """Look at a run once more while nobody else can change it, and perhaps repair it."""
        with self._rows.read_committed():
            self._rows.begin_writing()
            runs = self._rows.runs.filter(pk=run_id)
            run = self._rows.with_lock(runs, no_key=True).first()
            if run is None or self._label_rows_now(run_id) == _expected(run):
                return False
            if repair:
                self._rows.replace_labels(run_id, run.labels)
            return True

    def _label_rows_now(self, run_id: str) -> _Rows:
        rows = self._rows.as_of_now(self._rows.labels.filter(run_id=run_id))
        return {
            name: (value, started_at)
            for name, value, started_at in rows.values_list("name", "value", "started_at")
        }


def _expected(run: WorkflowRun) -> _Rows:
    return {name: (value, run.started_at) for name, value in run.labels.items()}
