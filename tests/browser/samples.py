"""Runs of every kind, stored while the admin is looked at in a browser."""

from dataclasses import dataclass
from datetime import timedelta

from django.contrib.admin.utils import quote
from django.urls import reverse
from django.utils import timezone

from workflow_storage import ExecutionState, RunStatus, WorkflowRun
from workflow_storage.testing import stored_run
from workflow_storage.transfer import fork_run

MARKUP = "\"><img src=x onerror=alert(1)>'&lt;{{<script>alert(1)</script>"
SECRET = "s3cr3t-value"
LONG_ERROR = "Traceback (most recent call last):\n" + "".join(
    f'  File "/srv/app/nodes/{"very_" * 20}long.py", line {line}, in node\n' for line in range(300)
)


@dataclass
class Stored:
    """What is in the store."""

    by_status: dict[str, WorkflowRun]
    """A run of the workflow "invoices" in each status, begun once."""
    failed: WorkflowRun
    """With a long error, two attempts, labels, states, a child, a fork and secrets."""
    running: WorkflowRun
    stalled: WorkflowRun
    waiting: WorkflowRun
    recovered: WorkflowRun
    """Completed in its second attempt."""
    long: WorkflowRun
    """With so many steps that its timeline is folded by node."""
    child: WorkflowRun
    fork: WorkflowRun
    markup: WorkflowRun
    """With markup in everything that is text."""
    state: ExecutionState
    """Of the failed run, in the middle."""
    markup_state: ExecutionState

    @property
    def steps(self):
        """The numbers of the first step of the failed run, one in the middle, and the last."""
        return 0, 2, 5


def store_runs(backend):
    by_status = {}
    for number, status in enumerate(RunStatus):
        run = by_status[status.value] = stored_run(
            backend,
            workflow_name="invoices",
            status=status,
            inputs={"file": f"{number}.pdf", "pages": list(range(5))},
            labels={"customer": "acme", "number": str(number)},
            total_tokens=1234 * number,
            total_cost_usd=0.01 * number,
            current_node=f"node-{number}",
            error_message="ValueError: broken" if status == "failed" else None,
        )
        add_states(backend, run, number)
    failed = add_failed(backend)
    running = stored_run(backend, workflow_name="invoices")
    backend.runs.update_status(running.id, "running", worker="worker-2")
    add_states(backend, running, 2)
    waiting = stored_run(backend, workflow_name="approvals", status="running")
    add_states(backend, waiting, 2)
    backend.runs.update_status(waiting.id, "pending", waiting_for="approval by finance")
    recovered = stored_run(backend, workflow_name="invoices", status="running")
    add_states(backend, recovered, 2)
    backend.runs.update_status(recovered.id, "failed", error_message="OSError: the disk is full")
    backend.runs.update_status(recovered.id, "running", worker="worker-3")
    add_states(backend, recovered, 1)
    backend.runs.update_status(recovered.id, "completed", outputs={"total": 42})
    long = stored_run(backend, workflow_name="crawl", status="running")
    add_states(backend, long, 150)
    backend.runs.update_status(long.id, "completed", outputs={"pages": 150})
    markup = add_markup(backend)
    child = stored_run(backend, workflow_name="invoices", parent_id=failed.id, status="completed")
    return Stored(
        by_status=by_status,
        failed=backend.runs.get(failed.id),
        running=backend.runs.get(running.id),
        stalled=add_stalled(backend),
        waiting=waiting,
        recovered=recovered,
        long=long,
        child=child,
        fork=fork_run(failed.id, 2, backend=backend),
        markup=backend.runs.get(markup.id),
        state=ExecutionState.objects.get(run_id=failed.id, step=2),
        markup_state=ExecutionState.objects.filter(run_id=markup.id).last(),
    )


def add_failed(backend):
    run = stored_run(
        backend,
        workflow_name="a-workflow-with-quite-a-long-name",
        labels={"customer": "acme"},
        config_snapshot={"model": "small", "api_key": SECRET},
    )
    for error in ("The first try failed.", LONG_ERROR):
        backend.runs.update_status(run.id, "running", worker="worker-1")
        add_states(backend, run, 3)
        backend.runs.update_status(run.id, "failed", error_message=error, current_node="node-3")
    return run


def add_stalled(backend):
    run = stored_run(backend, workflow_name="invoices", status="running", worker="worker-4")
    add_states(backend, run, 2)
    silent_since = timezone.now() - timedelta(hours=2)
    ExecutionState.objects.filter(run_id=run.id).update(created_at=silent_since)
    WorkflowRun.objects.filter(pk=run.id).update(
        started_at=silent_since, attempt_started_at=silent_since, heartbeat_at=None
    )
    return run


def add_markup(backend):
    run = stored_run(
        backend,
        id=MARKUP[:36],
        workflow_name=MARKUP,
        inputs={MARKUP: MARKUP},
        outputs=[MARKUP],
        config_snapshot=MARKUP,
        labels={"markup": MARKUP},
    )
    backend.runs.update_status(run.id, "running", worker=MARKUP)
    backend.states.save_state(run.id, {MARKUP: [MARKUP]}, MARKUP)
    backend.states.save_state(run.id, {MARKUP: {MARKUP: f"{MARKUP}\n" * 3}}, MARKUP)
    backend.runs.update_status(run.id, "failed", error_message=MARKUP, current_node=MARKUP)
    return run


def add_states(backend, run, count):
    for number in range(count):
        backend.states.save_state(
            run.id,
            {
                "at": number,
                "text": "a few words " * 20,
                "letter": f"Dear reader,\nthis is letter {number}.\nYours\n" * 5,
                "items": [{"n": n} for n in range(10)],
                "session_token": f"{SECRET}-{number}",
            },
            f"node-{number % 12}",
            duration_seconds=0.5,
            tokens=100,
            cost_usd=0.001,
        )


def page_of_state(state):
    return reverse("admin:workflow_storage_executionstate_change", args=[quote(str(state.pk))])


def view(name, *args):
    """Return the address of one of the further pages of runs; ids of runs are quoted."""
    quoted = [quote(arg) if isinstance(arg, str) else arg for arg in args]
    return reverse(f"admin:workflow_storage_run_{name}", args=quoted)
