"""The admin on a site of django-unfold, for tests: their addresses are those of this module."""

from django.urls import path
from unfold.admin import ModelAdmin
from unfold.sites import UnfoldAdminSite

from workflow_storage import ExecutionState, WorkflowRun
from workflow_storage.admin import ExecutionStateAdmin, WorkflowRunAdmin


class UnfoldedRunAdmin(WorkflowRunAdmin, ModelAdmin):
    pass


class UnfoldedStateAdmin(ExecutionStateAdmin, ModelAdmin):
    pass


site = UnfoldAdminSite(name="unfolded")
site.register(WorkflowRun, UnfoldedRunAdmin)
site.register(ExecutionState, UnfoldedStateAdmin)

urlpatterns = [path("unfolded/", site.urls)]
