"""A second admin site, with a subclass of an admin, as a project would have it."""

from django.contrib import admin
from django.urls import path

from workflow_storage import ExecutionState, WorkflowRun
from workflow_storage.admin import ExecutionStateAdmin, WorkflowRunAdmin

site = admin.AdminSite(name="operations")


@admin.register(WorkflowRun, site=site)
class InvoiceRunAdmin(WorkflowRunAdmin):
    list_display = (*WorkflowRunAdmin.list_display, "file")
    payloads = ("config_snapshot", "outputs", "error_message")
    actions = ("name",)

    def file(self, run):
        return run.inputs["file"]

    @admin.action
    def name(self, request, queryset):
        self.message_user(request, " ".join(run.pk for run in queryset))


site.register(ExecutionState, ExecutionStateAdmin)

urlpatterns = [path("admin/", admin.site.urls), path("operations/", site.urls)]
