"""The app that records Django's tasks."""

from django.apps import AppConfig


class DjangoTasksConfig(AppConfig):
    """Listens to the signals of tasks."""

    name = "workflow_storage.contrib.django_tasks"
    label = "workflow_storage_django_tasks"

    def ready(self) -> None:
        """Connect the receivers, and register what ``manage.py check`` says."""
        from workflow_storage.contrib.django_tasks.receivers import SETTING, connect_receivers
        from workflow_storage.contrib.options import register_check

        connect_receivers()
        register_check(SETTING)
