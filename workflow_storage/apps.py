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
        """Register what ``manage.py check`` says, and what becomes of connections over a fork."""
        # A process that is forked before it uses a store leaves its child connections, too.
        import workflow_storage.backends.orm.forks  # noqa: F401
        from workflow_storage.checks import check_configuration

        checks.register(check_configuration)
