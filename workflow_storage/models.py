"""The schema: runs, their states, their labels and their attempts; for backends/orm/."""

import sys
from typing import Any

from django.db import models
from django.utils import timezone
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from workflow_storage.deltas import (
    chain_steps,
    is_delta,
    rebuilt_state,
    whole_state,
)
from workflow_storage.exceptions import NotInDatabaseError
from workflow_storage.fields import ExactCharField, ExactJSONField, ExactTextField
from workflow_storage.querysets import WorkflowRunQuerySet
from workflow_storage.status import RunStatus

if sys.version_info >= (3, 14):
    from uuid import uuid7
else:
    from uuid_utils.compat import uuid7


def new_run_id() -> str:
    """Make a UUIDv7 (RFC 9562) as text: 36 characters that sort by time of creation."""
    return str(uuid7())


class WorkflowRun(models.Model):
    """One run of a workflow: what went in, what came out, what it cost, how it ended."""

    id = ExactCharField(_("id"), primary_key=True, max_length=36, default=new_run_id)
    workflow_name = ExactCharField(_("workflow"), max_length=256)
    status = ExactCharField(
        _("status"), max_length=32, choices=RunStatus.choices, default=RunStatus.PENDING
    )
    config_snapshot = ExactJSONField(_("configuration"), null=True, blank=True)
    inputs = ExactJSONField(_("inputs"), null=True, blank=True)
    outputs = ExactJSONField(_("outputs"), null=True, blank=True)
    error_message = ExactTextField(_("error"), null=True, blank=True)
    started_at = models.DateTimeField(_("started"), default=timezone.now)
    completed_at = models.DateTimeField(_("completed"), null=True, blank=True)
    duration_seconds = models.FloatField(_("duration in seconds"), null=True, blank=True)
    total_tokens = models.BigIntegerField(_("tokens"), null=True, blank=True)
    total_cost_usd = models.FloatField(_("cost in USD"), null=True, blank=True)
    heartbeat_at = models.DateTimeField(_("last heartbeat"), null=True, blank=True)
    current_node = ExactCharField(_("node"), max_length=128, null=True, blank=True)
    waiting_for = ExactCharField(_("waiting for"), max_length=256, null=True, blank=True)
    attempt = models.PositiveIntegerField(_("attempt"), default=0)
    attempt_started_at = models.DateTimeField(_("attempt started"), null=True, blank=True)
    worker = ExactCharField(_("worker"), max_length=128, null=True, blank=True)
    parent_id = ExactCharField(_("parent"), max_length=36, null=True, blank=True)
    forked_from_step = models.PositiveIntegerField(_("forked from step"), null=True, blank=True)
    labels = ExactJSONField(_("labels"), default=dict, blank=True)

    objects = models.Manager.from_queryset(WorkflowRunQuerySet)()

    class Meta:
        """Table, names, and one index for each order that the contract reads in.

        None holds a column that a checkpoint or a heartbeat changes, or PostgreSQL could not
        update rows in place (HOT).
        """

        db_table = "workflow_runs"
        verbose_name = _("workflow run")
        verbose_name_plural = _("workflow runs")
        permissions = [("view_secrets", _("Can see secrets in payloads and states"))]
        indexes = [
            # With what a summary of a time reads, so that it need not look at the rows.
            models.Index(
                fields=["started_at", "id", "status", "workflow_name", "duration_seconds"],
                name="workflow_runs_started",
            ),
            models.Index(fields=["workflow_name", "started_at", "id"], name="workflow_runs_name"),
            models.Index(fields=["status", "started_at", "id"], name="workflow_runs_status"),
            # The same for a summary by workflow, and it costs no write more: with it changes the status.
            models.Index(
                fields=["workflow_name", "status", "started_at", "id", "duration_seconds"],
                name="workflow_runs_name_status",
            ),
            models.Index(fields=["completed_at", "id"], name="workflow_runs_completed"),
            models.Index(fields=["parent_id"], name="workflow_runs_parent"),
        ]

    def __str__(self) -> str:
        return f"{self.workflow_name} {self.id}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Store the run, as any model, unless it is in a store that is no Django database."""
        self.refuse_elsewhere(
            "save()", "change it with runs.update() or runs.update_status() of that store"
        )
        super().save(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, int]]:
        """Delete the run, as any model, unless it is in a store that is no Django database."""
        self.refuse_elsewhere("delete()", "delete it with runs.delete() of that store")
        return super().delete(*args, **kwargs)

    def refresh_from_db(self, *args: Any, **kwargs: Any) -> None:
        """Read the run again, as any model, unless it is in a store that is no Django database."""
        self.refuse_elsewhere("refresh_from_db()", "read it again with runs.get() of that store")
        super().refresh_from_db(*args, **kwargs)

    def refuse_elsewhere(self, method: str, instead: str) -> None:
        """Refuse a method that looks into a Django database for a run of another store.

        Raises:
            NotInDatabaseError: if this run was read from such a store, or added to it.
        """
        if self._state.db is None and not self._state.adding:
            raise NotInDatabaseError(self.id, method, instead)


_INSTEAD = {
    "states": "read them with states.get_state_history() of that store",
    "label_rows": "they are in run.labels",
    "attempt_rows": "read them with runs.list_attempts() of that store",
}


class _OfRun(models.Manager):  # type: ignore[type-arg]
    """What belongs to runs; as ``run.states`` it looks into the database that the run is in."""

    def get_queryset(self) -> Any:
        run = getattr(self, "instance", None)
        if isinstance(run, WorkflowRun):
            name = self.field.remote_field.related_name  # type: ignore[attr-defined]
            run.refuse_elsewhere(f"run.{name}", _INSTEAD[name])
        return super().get_queryset()


class WorkflowRunLabel(models.Model):
    """The index over the labels of the runs; kept equal to them by the repositories."""

    pk = models.CompositePrimaryKey("run_id", "name")
    run = models.ForeignKey(
        WorkflowRun,
        on_delete=models.CASCADE,
        related_name="label_rows",
        verbose_name=_("workflow run"),
        db_index=False,
    )
    name = ExactCharField(_("name"), max_length=64)
    value = ExactCharField(_("value"), max_length=256)
    started_at = models.DateTimeField(_("started"))

    objects = _OfRun()

    class Meta:
        """Table, names, and the order in which a page of a label's runs is read."""

        db_table = "workflow_run_labels"
        verbose_name = _("label of a workflow run")
        verbose_name_plural = _("labels of workflow runs")
        indexes = [
            models.Index(
                fields=["name", "value", "started_at", "run"], name="workflow_run_labels_value"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.run_id} {self.name}={self.value}"


class WorkflowRunAttempt(models.Model):
    """What an attempt that is over ended with; the newest one is in the run itself."""

    pk = models.CompositePrimaryKey("run_id", "number")
    run = models.ForeignKey(
        WorkflowRun,
        on_delete=models.CASCADE,
        related_name="attempt_rows",
        verbose_name=_("workflow run"),
        db_index=False,
    )
    number = models.PositiveIntegerField(_("number"))
    started_at = models.DateTimeField(_("started"), null=True)
    ended_at = models.DateTimeField(_("ended"), null=True)
    status = ExactCharField(_("status"), max_length=32, choices=RunStatus.choices)
    error_message = ExactTextField(_("error"), null=True)
    node = ExactCharField(_("node"), max_length=128, null=True)
    worker = ExactCharField(_("worker"), max_length=128, null=True)

    objects = _OfRun()

    class Meta:
        """Table and names."""

        db_table = "workflow_run_attempts"
        verbose_name = _("attempt of a workflow run")
        verbose_name_plural = _("attempts of workflow runs")

    def __str__(self) -> str:
        return f"{self.run_id} attempt {self.number} ({self.status})"


class ExecutionState(models.Model):
    """The state of a run after one node: whole as JSON text, or as a delta."""

    id = models.BigAutoField(_("id"), primary_key=True)
    run = models.ForeignKey(
        WorkflowRun,
        on_delete=models.CASCADE,
        related_name="states",
        verbose_name=_("workflow run"),
        # The unique constraint's index begins with the run.
        db_index=False,
    )
    step = models.PositiveIntegerField(_("step"))
    node_id = ExactCharField(_("node"), max_length=128)
    created_at = models.DateTimeField(_("created"), default=timezone.now)
    attempt = models.PositiveIntegerField(_("attempt"), null=True)
    duration_seconds = models.FloatField(_("duration in seconds"), null=True)
    tokens = models.BigIntegerField(_("tokens"), null=True)
    cost_usd = models.FloatField(_("cost in USD"), null=True)
    state_json = ExactTextField(_("state as JSON text"), null=True)
    state_delta = models.BinaryField(_("state as a delta"), null=True)

    objects = _OfRun()

    class Meta:
        """Table, names, and what the database itself guarantees."""

        db_table = "execution_states"
        verbose_name = _("execution state")
        verbose_name_plural = _("execution states")
        constraints = [
            models.UniqueConstraint(fields=["run", "step"], name="execution_states_run_step"),
            models.CheckConstraint(
                condition=models.Q(state_json__isnull=False, state_delta__isnull=True)
                | models.Q(state_json__isnull=True, state_delta__isnull=False),
                name="execution_states_whole_or_delta",
            ),
        ]

    def __str__(self) -> str:
        words = {"run": self.run_id, "step": self.step, "node": self.node_id}
        return gettext("%(run)s step %(step)s (%(node)s)") % words

    @property
    def state_data(self) -> dict[str, Any]:
        """The state as a dict, however it is stored; a delta takes one more query.

        Raises:
            DamagedStateError: if what is stored cannot be rebuilt.
        """
        if self.state_delta is None:
            return whole_state(self.run_id, self.step, self.state_json or "")
        return rebuilt_state(self.run_id, self.step, self._chain())

    @property
    def stored(self) -> bytes:
        """What is stored, as `workflow_storage.deltas` takes it: JSON text or a delta."""
        return stored_bytes(self.state_json, self.state_delta)

    @stored.setter
    def stored(self, stored: bytes) -> None:
        delta = is_delta(stored)
        self.state_json = None if delta else stored.decode()
        self.state_delta = stored if delta else None

    def _chain(self) -> dict[int, bytes]:
        states = ExecutionState._base_manager.using(self._state.db).filter(run_id=self.run_id)
        return {
            state.step: state.stored for state in states.filter(step__in=chain_steps(self.step))
        }


def stored_bytes(state_json: str | None, state_delta: bytes | memoryview | None) -> bytes:
    """Return what is stored in the two columns as `workflow_storage.deltas` takes it."""
    # Some drivers give a memoryview.
    return bytes(state_delta or b"") if state_json is None else state_json.encode()
