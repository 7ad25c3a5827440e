"""The app that records Celery's tasks."""

from django.apps import AppConfig


class CeleryConfig(AppConfig):
    """Listens to the signals of Celery."""

    name = "workflow_storage.contrib.celery"
    label = "workflow_storage_celery"

    def ready(self) -> None:
        """Check the setting, and connect the receivers."""
        from workflow_storage.contrib.celery.options import SETTING, project_config
        from workflow_storage.contrib.celery.receivers import connect_receivers
        from workflow_storage.contrib.options import register_check

        project_config()
        connect_receivers()
        register_check(SETTING)
