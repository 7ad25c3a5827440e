"""The statements on states that Django's ORM cannot write, as SQL; for `state_rows`.

Each builds the SQL for a database, and what fills its places: values, or a `Parameter` for each of those
that differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db.models import F, Subquery
from django.db.models.functions import Coalesce

from workflow_storage.backends.orm.compiled_queries import Parameter
from workflow_storage.backends.orm.repository import RUN_ID
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper


def step_parameter(name: str) -> Parameter:
    """Return a step that is given when a query is executed."""
    return Parameter(name, ExecutionState._meta.get_field("step"))


def next_step() -> dict[str, Any]:
    """Return the next step of a run. If there is no such run, its foreign key refuses the row."""
    states = ExecutionState._base_manager.filter(run_id=RUN_ID).order_by("-step")
    return {"step": Coalesce(Subquery(states.values_list(F("step") + 1)[:1]), 0)}


def insert_expected(
    connection: BaseDatabaseWrapper, *, names: Sequence[str]
) -> tuple[str, list[Any]]:
    """Insert a whole state at a step, if that is the next one."""
    name_of = connection.ops.quote_name
    table = name_of(ExecutionState._meta.db_table)
    columns = ", ".join(name_of(_field(name).column) for name in (*names, "step"))
    values = ", ".join(["%s"] * (len(names) + 1))
    sql = (
        f"INSERT INTO {table} ({columns}) SELECT {values} FROM {table} WHERE run_id = %s "
        "HAVING COALESCE(MAX(step) + 1, 0) = %s"
    )
    expected = [_saved("step"), _saved("run_id"), _saved("step")]
    return sql, [*map(_saved, names), *expected]


def insert_following(
    connection: BaseDatabaseWrapper, *, names: Sequence[str], based: bool
) -> tuple[str, list[Any]]:
    """Insert a state at a step, if that is the next one and its base is there."""
    name_of = connection.ops.quote_name
    table = name_of(ExecutionState._meta.db_table)
    columns = ", ".join(name_of(_field(name).column) for name in names)
    values = ", ".join(["%s"] * len(names))
    sql = (
        f"INSERT INTO {table} ({columns}) SELECT {values} "
        f"WHERE (SELECT MAX(step) + 1 FROM {table} WHERE run_id = %s) = %s"
    )
    params = [*map(_saved, names), _saved("run_id"), _saved("step")]
    if based:
        sql += (
            f" AND EXISTS (SELECT 1 FROM {table} WHERE id = %s AND run_id = %s AND created_at = %s)"
        )
        params += [
            Parameter("base_id", _field("id")),
            _saved("run_id"),
            Parameter("base_created_at", _field("created_at"), for_save=True),
        ]
    return sql, params


def insert_following_and_note(
    connection: BaseDatabaseWrapper,
    *,
    names: Sequence[str],
    based: bool,
    noted: Sequence[str],
    fenced: bool,
) -> tuple[str, list[Any]]:
    """Do the same, and note something in the run, in one statement that locks the run first.

    Where the step is not the next one, or the base is not there, nothing is done and the step is refused.
    """
    table = connection.ops.quote_name(ExecutionState._meta.db_table)
    run, params = _locked_run(connection, noted=noted, fenced=fenced)
    base, holds_base = "", ""
    if based:
        # Locked after the run is, as by whoever deletes states. If that one was quicker, it is not
        # there, though this statement began before.
        base = (
            f", base AS (SELECT one.id FROM {table} AS one JOIN run ON one.run_id = run.id "
            "WHERE one.id = %s AND one.created_at = %s FOR NO KEY UPDATE OF one)"
        )
        holds_base = " AND EXISTS (SELECT 1 FROM base)"
        params += [
            Parameter("base_id", _field("id")),
            Parameter("base_created_at", _field("created_at"), for_save=True),
        ]
    columns, values = _selected(connection, names)
    # A step of NULL is refused, and takes back what was noted.
    sql = (
        f"WITH run AS ({run}){base} INSERT INTO {table} ({columns}, step) SELECT {values}, "
        f"CASE WHEN (SELECT step + 1 FROM {table} WHERE run_id = %s ORDER BY step DESC LIMIT 1) = %s"
        f"{holds_base} THEN %s::integer END FROM run RETURNING id"
    )
    return sql, [*params, *map(_saved, names), RUN_ID, _saved("step"), _saved("step")]


def _locked_run(
    connection: BaseDatabaseWrapper, *, noted: Sequence[str], fenced: bool
) -> tuple[str, list[Any]]:
    """Lock a run, and note something in it, unless somebody has changed it since the snapshot.

    A statement of PostgreSQL that waits for the lock goes on with what it saw before it waited: steps
    that are in use by now, and perhaps have been deleted again, would look free. Whoever deletes states,
    or saves them at steps of their own, changes the run, too, so that such a statement finds none.
    """
    table = connection.ops.quote_name(WorkflowRun._meta.db_table)
    as_seen = f" AND xmin = (SELECT seen.xmin FROM {table} AS seen WHERE seen.id = %s)"
    if noted:
        sql, params = note(connection, noted=noted, fenced=fenced)
        return f"{sql}{as_seen} RETURNING id", [*params, RUN_ID]
    sql = f"SELECT id FROM {table} WHERE id = %s{as_seen} FOR NO KEY UPDATE"
    return sql, [RUN_ID, RUN_ID]


def _selected(connection: BaseDatabaseWrapper, names: Sequence[str]) -> tuple[str, str]:
    """Return the columns of an INSERT, and the values for them as a SELECT takes them."""
    name_of = connection.ops.quote_name
    columns = ", ".join(name_of(_field(name).column) for name in names)
    # Without its type, what is selected would be text.
    return columns, ", ".join(f"%s::{_field(name).db_type(connection)}" for name in names)


def note(
    connection: BaseDatabaseWrapper, *, noted: Sequence[str], fenced: bool
) -> tuple[str, list[Any]]:
    """Note something in a run, if it is in an attempt where it has to be."""
    name_of = connection.ops.quote_name
    meta = WorkflowRun._meta
    changes = ", ".join(f"{name_of(name)} = %s" for name in noted)
    params: list[Any] = [Parameter(name, meta.get_field(name), for_save=True) for name in noted]
    sql = f"UPDATE {name_of(meta.db_table)} SET {changes} WHERE id = %s"
    params.append(RUN_ID)
    if fenced:
        sql += " AND status = %s AND attempt = %s"
        params += [RunStatus.RUNNING.value, Parameter("of_attempt", meta.get_field("attempt"))]
    return sql, params


def insert_and_note(
    connection: BaseDatabaseWrapper, *, noted: Sequence[str], fenced: bool, names: Sequence[str]
) -> tuple[str, list[Any]]:
    """Lock a run, note something in it, and insert a whole state as its next one."""
    run, params = _locked_run(connection, noted=noted, fenced=fenced)
    table = connection.ops.quote_name(ExecutionState._meta.db_table)
    columns, values = _selected(connection, names)
    sql = (
        f"WITH run AS ({run}) INSERT INTO {table} ({columns}, step) SELECT {values}, "
        f"COALESCE((SELECT step + 1 FROM {table} WHERE run_id = %s ORDER BY step DESC LIMIT 1), 0) "
        "FROM run RETURNING id, step"
    )
    return sql, [*params, *map(_saved, names), RUN_ID]


def copy(connection: BaseDatabaseWrapper) -> tuple[str, list[Any]]:
    """Insert the states of a run up to a step for another run."""
    name_of = connection.ops.quote_name
    meta = ExecutionState._meta
    table = name_of(meta.db_table)
    names = [str(one.column) for one in meta.concrete_fields if one.name not in {"id", "run"}]
    columns = ", ".join(name_of(name) for name in names)
    run_id = "%s::varchar" if connection.vendor == "postgresql" else "%s"
    sql = (
        f"INSERT INTO {table} (run_id, {columns}) SELECT {run_id}, {columns} FROM {table} "
        "WHERE run_id = %s AND step <= %s ORDER BY step"
    )
    return sql, [Parameter("target_run_id", _field("run")), RUN_ID, step_parameter("through")]


def _field(name: str) -> Any:
    return ExecutionState._meta.get_field(name)


def _saved(name: str) -> Parameter:
    return Parameter(name, _field(name), for_save=True)
