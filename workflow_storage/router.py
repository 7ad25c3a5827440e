"""A database router that keeps the runs in the database of WORKFLOW_STORAGE.

For DATABASE_ROUTERS of projects that store runs in another database than ``default``: the
models then read and write there, and ``migrate`` makes the tables there only.
"""

from typing import Any

from django.db import models

from workflow_storage.backends import door_of
from workflow_storage.config import APP_LABELS, project_databases, storage_config
from workflow_storage.factory import configured_alias


class WorkflowStorageRouter:
    """Sends the models of this package to the database of WORKFLOW_STORAGE."""

    def db_for_read(self, model: type[models.Model], **hints: Any) -> str | None:
        """Return the database for the models of this package: that of the run at hand, if any."""
        if model._meta.app_label not in APP_LABELS:
            return None
        instance = hints.get("instance")
        own: str | None = instance._state.db if instance is not None else None
        return own or configured_alias()

    db_for_write = db_for_read

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        """Allow the tables in that database, and in those given by URL or path."""
        if app_label not in APP_LABELS or db not in project_databases():
            return None
        config = storage_config()
        if door_of(config).database_settings(config) is None:
            # Runs that are copied out of another store go to any database.
            return None
        return db == config.backend
