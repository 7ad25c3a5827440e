"""The app that records Django's tasks."""

from django.apps import AppConfig


class DjangoTasksConfig(AppConfig):
    """Listens to the signals of tasks."""

    name = "workflow_storage.contrib.django_tasks"
    label = "workflow_storage_django_tasks"

    def ready(self) -> None:
        """Connect the receivers."""
        from workflow_storage.contrib.django_tasks.receivers import connect_receivers

        connect_receivers()
