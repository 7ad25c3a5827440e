"""The schema: threads, their checkpoints, the values of their channels, and pending writes."""

from django.db import models
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from workflow_storage.fields import ExactCharField, ExactJSONField, ExactTextField

APP_LABEL = "workflow_storage_langgraph"
"""The app of the tables, also where it is not installed: the app around it has none of them."""

MAX_ID = 128
"""Characters of the id of a checkpoint or a task; LangGraph's have 36."""


class ThreadNamespace(models.Model):
    """A thread as one graph sees it: the namespace of the root graph is empty, each subgraph has one.

    Names of any length have a digest as their key, for no database indexes a long text.
    """

    key = ExactCharField(max_length=64, unique=True)
    thread_key = ExactCharField(max_length=64)
    thread_id = ExactTextField(_("thread"))
    namespace = ExactTextField(_("namespace"), blank=True)
    generation = models.PositiveIntegerField()
    """Changes whenever something is deleted, so that who remembers values knows."""
    created_at = models.DateTimeField(_("created"), default=timezone.now)

    class Meta:
        """Table, names, and the index that finds all namespaces of a thread."""

        app_label = APP_LABEL
        db_table = "workflow_graph_threads"
        default_permissions = ("view",)
        verbose_name = _("thread of a graph")
        verbose_name_plural = _("threads of graphs")
        indexes = [models.Index(fields=["thread_key"], name="workflow_graph_threads_key")]

    def __str__(self) -> str:
        return f"{self.thread_id} {self.namespace}".rstrip()


class GraphCheckpoint(models.Model):
    """A checkpoint of a graph: all but the values that are stored as blobs."""

    id = models.BigAutoField(_("id"), primary_key=True)
    # The unique constraint's index begins with the thread.
    thread = models.ForeignKey(
        ThreadNamespace, on_delete=models.CASCADE, related_name="checkpoints", db_index=False
    )
    checkpoint_id = ExactCharField(_("checkpoint"), max_length=MAX_ID)
    parent_checkpoint_id = ExactCharField(_("parent"), max_length=MAX_ID, null=True)
    created_at = models.DateTimeField(_("created"), default=timezone.now)
    run_id = ExactCharField(_("workflow run"), max_length=36, null=True)
    """The run that was being recorded around the graph."""
    graph_run_key = ExactCharField(max_length=64, null=True)
    """The `run_id` of LangGraph's metadata, or its digest."""
    metadata = ExactJSONField(_("metadata"))
    blobs = ExactJSONField()
    """The ids of `ChannelBlob`, by channel."""
    type = ExactTextField()
    data = models.BinaryField()

    class Meta:
        """Table, names, and what is looked up."""

        app_label = APP_LABEL
        db_table = "workflow_graph_checkpoints"
        default_permissions = ("view",)
        verbose_name = _("checkpoint of a graph")
        verbose_name_plural = _("checkpoints of graphs")
        constraints = [
            models.UniqueConstraint(
                fields=["thread", "checkpoint_id"], name="workflow_graph_checkpoints_id"
            )
        ]
        indexes = [
            models.Index(fields=["run_id"], name="workflow_graph_checkpoints_run"),
            models.Index(fields=["graph_run_key"], name="workflow_graph_checkpoints_key"),
        ]

    def __str__(self) -> str:
        return str(self.checkpoint_id)


class ChannelBlob(models.Model):
    """The value of a channel at a version: whole, or as a delta to an earlier one."""

    id = models.BigAutoField(primary_key=True)
    thread = models.ForeignKey(ThreadNamespace, on_delete=models.CASCADE, related_name="blobs")
    channel = ExactTextField()
    version = ExactTextField()
    base_id = models.BigIntegerField(null=True)
    position = models.PositiveIntegerField()
    """How many values came before it, since the last one that is whole."""
    type = ExactTextField()
    data = models.BinaryField()

    class Meta:
        """Table."""

        app_label = APP_LABEL
        db_table = "workflow_graph_blobs"
        default_permissions = ()

    def __str__(self) -> str:
        return f"{self.channel} {self.version}"


class CheckpointWrite(models.Model):
    """What a task has written after a checkpoint."""

    id = models.BigAutoField(primary_key=True)
    # The unique constraint's index begins with the thread.
    thread = models.ForeignKey(
        ThreadNamespace, on_delete=models.CASCADE, related_name="writes", db_index=False
    )
    # The writes of a task can be stored before their checkpoint is.
    checkpoint_id = ExactCharField(max_length=MAX_ID)
    task_id = ExactCharField(max_length=MAX_ID)
    idx = models.IntegerField()
    channel = ExactTextField()
    task_path = ExactTextField()
    type = ExactTextField()
    data = models.BinaryField()

    class Meta:
        """Table, and what LangGraph tells writes by."""

        app_label = APP_LABEL
        db_table = "workflow_graph_writes"
        default_permissions = ()
        constraints = [
            models.UniqueConstraint(
                fields=["thread", "checkpoint_id", "task_id", "idx"],
                name="workflow_graph_writes_task",
            )
        ]

    def __str__(self) -> str:
        return f"{self.channel} {self.task_id}"
