"""``show_run``: a run and its steps, its states, and what changed in them."""

import csv
import io
import json
import threading
import time

import pytest
from django.core.management import CommandError, call_command

from tests.management.conftest import run_command
from workflow_storage import record_run, resume_run
from workflow_storage.testing import stored_run


def test_show_run_prints_the_run_and_its_steps(every_backend, every_url):
    run = stored_run(
        every_backend,
        status="failed",
        inputs={"file": "a.pdf", "\0": "\ud800"},
        error_message="it\nbroke",
        current_node="extract",
        labels={"tenant": "acme"},
    )
    every_backend.states.save_state(run.id, {"pages": 3}, "ocr", tokens=1200, cost_usd=0.5)

    text = run_command("show_run", run.id, backend=every_url)

    for shown in (run.id, '"file": "a.pdf"', "broke", "ocr", "1,200", "0.5000", "tenant=acme"):
        assert shown in text
    assert text.splitlines()[-1] == "failed in extract: it"
    text.encode()


def test_a_unique_beginning_of_an_id_is_enough(every_backend, every_url):
    for run_id in ("abc-1", "abc-2", "abd"):
        stored_run(every_backend, id=run_id)

    assert "abd" in run_command("show_run", "abd", backend=every_url)
    assert "abc-2" in run_command("show_run", "abc-2", backend=every_url)
    assert "abd" in run_command("show_run", "abd", backend=every_url)
    with pytest.raises(CommandError, match=r"'abc' is the beginning of 2 ids: abc-1, abc-2\."):
        call_command("show_run", "abc", backend=every_url)
    with pytest.raises(CommandError, match="Workflow run not found: ac"):
        call_command("show_run", "ac", backend=every_url)


def test_show_run_as_json_is_everything(any_backend, any_url):
    run = stored_run(any_backend, inputs={"x": [1e23, "\0"]})
    shown = json.loads(run_command("show_run", run.id, backend=any_url, format="json"))
    assert shown["states"] == []
    for number in range(20):
        any_backend.states.save_state(run.id, {"n": number, "lone": "\ud800"}, f"node-{number}")

    shown = json.loads(run_command("show_run", run.id, backend=any_url, format="json"))

    assert shown["inputs"] == {"x": [1e23, "\0"]}
    assert shown["started_at"] == run.started_at.isoformat()
    assert [state["step"] for state in shown["states"]] == list(range(20))
    assert shown["states"][3]["state_data"] == {"n": 3, "lone": "\ud800"}


@pytest.fixture
def recorded(source):
    """A run of 60 steps that failed at step 30, and at its end."""
    try:
        with record_run("long", backend=source) as run:
            for number in range(60):
                if number == 31:
                    raise ValueError("in the middle")
                run.save_state(
                    {"number": number, "seen": list(range(number))}, node_id=f"n{number}"
                )
    except ValueError:
        pass
    try:
        with resume_run(run.run_id, backend=source) as again:
            for number in range(31, 60):
                again.save_state(
                    {"number": number, "seen": list(range(number))}, node_id=f"n{number}"
                )
            raise RuntimeError("at the end")
    except RuntimeError:
        pass
    return run.run_id


def steps_in(text):
    rows = text.partition("\nStep")[2].splitlines()[1:]
    return [int(row.split()[0]) for row in rows if row.split()[:1] and row.split()[0].isdigit()]


def test_of_many_steps_the_first_the_last_and_the_failed_are_shown(recorded, sqlite_url):
    text = run_command("show_run", recorded, backend=sqlite_url)

    assert steps_in(text) == [*range(10), 30, *range(40, 60)]
    assert "(20 more steps)" in text
    assert "(9 more steps)" in text
    assert "ValueError: in the middle" in text
    assert text.splitlines()[-1].startswith("failed in n59: RuntimeError: at the end")


def test_steps_are_shown_as_asked(recorded, sqlite_url):
    def shown(steps):
        return steps_in(run_command("show_run", recorded, steps=steps, backend=sqlite_url))

    assert shown("all") == list(range(60))
    assert shown("7") == [7]
    assert shown("7..9") == shown((7, 9)) == [7, 8, 9]
    assert shown("..2") == [0, 1, 2]
    assert shown("58..") == [58, 59]
    text = run_command("show_run", recorded, "--steps=3..4", format="csv", backend=sqlite_url)
    head, *rows = csv.DictReader(io.StringIO(text))
    assert [row["node_id"] for row in (head, *rows)] == ["n3", "n4"]
    assert json.loads(head["state_data"]) == {"number": 3, "seen": [0, 1, 2]}


def test_a_state_is_json_also_for_people(every_backend, every_url):
    run = stored_run(every_backend)
    for state in ({"a": "ü \x1b[31m \ud800"}, {"a": 2}):
        every_backend.states.save_state(run.id, state, "node")

    first = run_command("show_run", run.id, "--state", "0", backend=every_url)

    assert "ü" in first
    assert "\x1b" not in first
    assert json.loads(first) == {"a": "ü \x1b[31m \ud800"}
    assert json.loads(run_command("show_run", run.id, "--state", backend=every_url)) == {"a": 2}
    with pytest.raises(CommandError, match="has no checkpoint of step 7"):
        call_command("show_run", run.id, "--state", "7", backend=every_url)


def test_what_changed_is_shown_between_steps(every_backend, every_url):
    run = stored_run(every_backend)
    states = ({"n": 1, "t": "a\nb\nc"}, {"n": 1.0, "t": "a\nb\nd"}, {"n": 1.0, "x": [True]})
    for number, state in enumerate(states):
        every_backend.states.save_state(run.id, state, f"node-{number}")

    def changes(*arguments):
        text = run_command("show_run", run.id, *arguments, format="json", backend=every_url)
        return [(one["kind"], one["path"]) for one in json.loads(text)]

    assert changes("--diff") == [("removed", "t"), ("added", "x")]
    assert changes("--diff", "1") == [("changed", "n"), ("changed", "t")]
    assert changes("--diff", "0") == [("added", "n"), ("added", "t")]
    assert changes("--diff", "0..2") == [("changed", "n"), ("removed", "t"), ("added", "x")]
    text = run_command("show_run", run.id, "--diff", "1", backend=every_url)
    assert text.splitlines()[:3] == ["From step 0 to step 1 (node-1):", "~ n: 1 -> 1.0", "~ t"]
    assert "  - c" in text
    assert "  + d" in text


def test_two_runs_are_compared(every_backend, every_url):
    for run_id, total in (("one", 1), ("other", 2)):
        stored_run(every_backend, id=run_id, inputs={"total": total, "same": 1})
        every_backend.states.save_state(run_id, {"total": total}, "node")
    every_backend.states.save_state("other", {"total": 2}, "more")

    text = run_command("show_run", "one", "--compare", "oth", backend=every_url)

    assert "~ inputs.total: 1 -> 2" in text
    assert "~ state.total: 1 -> 2" in text
    assert "  + more" in text
    assert "same" not in text


def followed(backend, url, status, django_db_blocker):
    """Return the nodes that --follow shows of a run that ends so, and the error at the end."""
    run = stored_run(backend, status="running")
    backend.states.save_state(run.id, {}, "first")

    def work():
        with django_db_blocker.unblock():
            time.sleep(0.15)
            backend.states.save_state(run.id, {}, "second", tokens=5)
            backend.runs.update_status(run.id, status, error_message="why")
            if backend.alias:
                backend.close()

    worker = threading.Thread(target=work)
    worker.start()
    out, error = io.StringIO(), None
    try:
        call_command("show_run", run.id, "--follow", interval=0.1, backend=url, stdout=out)
    except CommandError as exc:
        error = exc
    worker.join()
    return [line.split()[3] for line in out.getvalue().splitlines()[1:3]], error


def test_a_run_is_followed_until_it_fails(any_backend, any_url, django_db_blocker):
    nodes, error = followed(any_backend, any_url, "failed", django_db_blocker)

    assert nodes == ["first", "second"]
    assert error.returncode == 1
    assert str(error).endswith("failed: why")


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("cancelled", 1)])
def test_the_exit_code_of_following_is_that_of_the_run(
    source, sqlite_url, status, code, django_db_blocker
):
    nodes, error = followed(source, sqlite_url, status, django_db_blocker)

    assert nodes == ["first", "second"]
    assert (error.returncode if error else 0) == code
