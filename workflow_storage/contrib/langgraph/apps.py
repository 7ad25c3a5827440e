"""The Django app: its name in the admin."""

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class LangGraphConfig(AppConfig):
    """Registers the app as ``workflow_storage_langgraph``."""

    name = "workflow_storage.contrib.langgraph"
    label = "workflow_storage_langgraph"
    verbose_name = _("Workflow storage: LangGraph")
    default_auto_field = "django.db.models.BigAutoField"
