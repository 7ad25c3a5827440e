"""A database router that keeps the runs in the database of WORKFLOW_STORAGE.

For DATABASE_ROUTERS of projects that store runs in another database than ``default``: the
models then read and write there, and ``migrate`` makes the tables there only.
"""

from typing import Any

from django.db import models

from workflow_storage.factory import (
    configured_alias,
    database_of_project,
    is_redis,
    project_backend,
    project_databases,
)

APP_LABEL = "workflow_storage"


class WorkflowStorageRouter:
    """Sends the models of this package to the database of WORKFLOW_STORAGE."""

    def db_for_read(self, model: type[models.Model], **hints: Any) -> str | None:
        """Give the database for the models of this package: that of the run at hand, if any."""
        if model._meta.app_label != APP_LABEL:
            return None
        instance = hints.get("instance")
        own: str | None = instance._state.db if instance is not None else None
        return own or _database()

    db_for_write = db_for_read

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        """Allow the tables in that database, and in those given by URL or path."""
        if app_label != APP_LABEL or db not in project_databases():
            return None
        # Runs that are copied out of Redis go to any database.
        return None if is_redis(project_backend()) else db == database_of_project()[0]


def _database() -> str:
    alias = database_of_project()[0]
    return alias if alias in project_databases() else configured_alias()
