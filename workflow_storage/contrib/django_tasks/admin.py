"""The task itself on the page of its run, where a queue in the database has it: what the queue says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.apps import apps
from django.contrib.admin.exceptions import NotRegistered
from django.urls import reverse
from django.utils.html import format_html
from django.utils.translation import gettext as _

from workflow_storage.admin.sections import register_section
from workflow_storage.contrib.django_tasks.receivers import BACKEND_LABEL

if TYPE_CHECKING:
    from django.contrib.admin import AdminSite
    from django.http import HttpRequest
    from django.utils.safestring import SafeString

    from workflow_storage.models import WorkflowRun


@register_section
def task_section(request: HttpRequest, site: AdminSite, run: WorkflowRun) -> SafeString | None:
    """Show the status of the task in the table of django-tasks-db, with a link to it."""
    if BACKEND_LABEL not in (run.labels or ()) or not apps.is_installed("django_tasks_db"):
        return None
    model = apps.get_app_config("django_tasks_database").get_model("DBTaskResult")
    try:
        task_id = UUID(run.id)
        may_view = site.get_model_admin(model).has_view_permission(request)
    except (ValueError, NotRegistered):
        return None
    if not may_view:
        return None
    task: Any = model._base_manager.filter(pk=task_id).only("status").first()
    if task is None:
        return None
    url = reverse(
        f"{site.name}:{model._meta.app_label}_{model._meta.model_name}_change", args=[task.pk]
    )
    return format_html(
        '<section class="module workflow-storage-section"><h2>{}</h2>'
        '<p><a href="{}">{}</a></p></section>',
        _("Task in the queue"),
        url,
        task.get_status_display(),
    )
