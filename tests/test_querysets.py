"""The runs as sentences, which say the same as the repositories."""

from datetime import timedelta

import pytest
from django.utils import timezone

from workflow_storage import RunStatus, WorkflowRun
from workflow_storage.testing import ids, stored_run

MINUTE = timedelta(minutes=1)


@pytest.fixture
def runs(sql_backend):
    """The runs of a store that has some in every status, started a minute apart."""
    now = timezone.now()
    for number in range(30):
        status = list(RunStatus)[number % 5]
        stored_run(
            sql_backend,
            status=status,
            waiting_for="approval" if status == "pending" and number > 12 else None,
            labels={"user": str(number % 2), "a b": "c"} if number % 3 else {},
            started_at=now - number * MINUTE,
        )
    return WorkflowRun.objects.using(sql_backend.alias)


def newest(queryset):
    return ids(list(queryset.order_by("-started_at", "-id")))


def test_sentences_say_what_the_filters_of_the_repositories_do(runs, sql_backend):
    listed = sql_backend.runs.list_runs
    assert newest(runs.running()) == ids(listed(status="running"))
    assert newest(runs.failed()) == ids(listed(status="failed"))
    assert newest(runs.finished()) == ids(listed(status=["completed", "failed", "cancelled"]))
    assert newest(runs.waiting()) == ids(listed(waiting=True))
    assert newest(runs.stalled(9 * MINUTE)) == ids(sql_backend.runs.list_stalled(9 * MINUTE))
    since = timezone.now() - 5.5 * MINUTE
    assert newest(runs.started_within(5.5 * MINUTE)) == ids(listed(started_after=since))


def test_labelled_runs_come_in_the_order_of_the_labels_rows(runs, sql_backend):
    found = runs.labelled(user="1")
    assert ids(list(found)) == ids(sql_backend.runs.list_runs(labels={"user": "1"}))
    both = runs.labelled({"a b": "c"}, user="0")
    assert ids(list(both)) == ids(sql_backend.runs.list_runs(labels={"a b": "c", "user": "0"}))
    assert runs.labelled().count() == 30
    assert "label_rows" not in str(found.query) and "workflow_run_labels" in str(found.query)


def test_sentences_can_be_joined(runs):
    joined = runs.failed().labelled(user="1").started_within(20 * MINUTE)
    assert joined.exists()
    assert all(run.status == "failed" and run.labels["user"] == "1" for run in joined)
