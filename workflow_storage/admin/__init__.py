"""Runs and their states in the Django admin, read-only, from the project's own backend."""

from workflow_storage.admin.runs import WorkflowRunAdmin
from workflow_storage.admin.states import ExecutionStateAdmin

__all__ = ["ExecutionStateAdmin", "WorkflowRunAdmin"]
