"""``fork_run``: a new run that begins where another one was."""

import json

import pytest
from django.core.management import CommandError, call_command

from tests.management.conftest import run_command
from workflow_storage import resume_run
from workflow_storage.testing import stored_run


def test_a_fork_has_the_history_up_to_a_step_and_can_be_resumed(every_backend, every_url):
    run = stored_run(every_backend, status="failed", labels={"tenant": "acme"}, inputs={"a": 1})
    for number in range(4):
        every_backend.states.save_state(run.id, {"n": number}, f"n{number}")

    text = run_command("fork_run", run.id[:30], step=2, format="json", backend=every_url)

    (fork,) = json.loads(text)
    assert (fork["parent_id"], fork["forked_from_step"], fork["status"]) == (run.id, 2, "pending")
    assert (fork["labels"], fork["inputs"]) == ({"tenant": "acme"}, {"a": 1})
    with resume_run(fork["id"], backend=every_backend) as resumed:
        assert resumed.state == {"n": 2}
    assert fork["id"] in run_command("list_runs", parent=run.id, backend=every_url)


def test_a_fork_can_have_labels_of_its_own(source, sqlite_url):
    run = stored_run(source, labels={"tenant": "acme"})
    source.states.save_state(run.id, {}, "node")

    text = run_command("fork_run", run.id, "--step=0", "--label=try=2", backend=sqlite_url)

    assert source.runs.list_runs(labels={"try": "2"})[0].id in text
    with pytest.raises(CommandError, match="has no checkpoint of step 1"):
        call_command("fork_run", run.id, step=1, backend=sqlite_url)
