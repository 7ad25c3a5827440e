"""The names of workflows that there are, read from their index one by one; for the admin.

DISTINCT would read all runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db import connections

from workflow_storage.models import WorkflowRun

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

LAST = "\U0010ffff"
"""Comes after every other character, in the order of the names."""


def workflow_names(alias: str, beginning: str = "", *, limit: int = 50) -> list[str]:
    """Return the first names of workflows that begin so, in their order.

    Args:
        alias: the database's name in DATABASES.
        beginning: what they begin with.
        limit: how many at most.
    """
    connection = connections[alias]
    name_of = connection.ops.quote_name
    table = name_of(WorkflowRun._meta.db_table)
    sql = (
        f"WITH RECURSIVE names(name, number) AS ("
        f"SELECT (SELECT MIN(workflow_name) FROM {table} WHERE workflow_name >= %s), 1 "
        f"UNION ALL SELECT (SELECT MIN(workflow_name) FROM {table} WHERE workflow_name > names.name), "
        f"number + 1 FROM names WHERE names.name IS NOT NULL AND number < %s) "
        "SELECT name FROM names WHERE name IS NOT NULL ORDER BY name"
    )
    with connection.cursor() as cursor:
        cursor.execute(sql, [beginning, limit])
        names = [str(name) for (name,) in cursor.fetchall()]
    return [name for name in names if name.startswith(beginning)]


def all_names(connection: BaseDatabaseWrapper) -> str:
    """Return SQL, to stand behind WITH RECURSIVE, of a table ``names`` with the ``name`` of each workflow."""
    table = connection.ops.quote_name(WorkflowRun._meta.db_table)
    least = f"SELECT MIN(workflow_name) AS name FROM {table}"
    return (
        f"each_name(name) AS ({least} UNION ALL SELECT ({least} WHERE workflow_name > each_name.name) "
        "FROM each_name WHERE each_name.name IS NOT NULL), "
        "names AS (SELECT name FROM each_name WHERE name IS NOT NULL)"
    )
