"""An admin site whose list of runs has the actions."""

from django.contrib import admin
from django.urls import path

from workflow_storage import ExecutionState, WorkflowRun
from workflow_storage.admin import ExecutionStateAdmin, WorkflowRunAdmin
from workflow_storage.admin.actions import RunActions

site = admin.AdminSite(name="acting")

_bases = (
    (WorkflowRunAdmin,)
    if issubclass(WorkflowRunAdmin, RunActions)
    else (RunActions, WorkflowRunAdmin)
)


@admin.register(WorkflowRun, site=site)
class ActingAdmin(*_bases):
    def get_queryset(self, request):
        return super().get_queryset(request).using(self.alias or "default")

    alias = None


site.register(ExecutionState, ExecutionStateAdmin)

urlpatterns = [path("admin/", admin.site.urls), path("acting/", site.urls)]
