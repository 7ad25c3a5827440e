"""The Django app: its name in the admin, and its system checks."""

from django.apps import AppConfig
from django.core import checks
from django.utils.translation import gettext_lazy as _


class WorkflowStorageConfig(AppConfig):
    """Registers the app as ``workflow_storage``."""

    name = "workflow_storage"
    verbose_name = _("Workflow storage")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register what ``manage.py check`` says about the configuration."""
        from workflow_storage.checks import check_configuration

        checks.register(check_configuration)
