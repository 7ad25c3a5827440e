"""``show_run``: a run and its steps, its states, and what changed in them."""

import csv
import io
import json
import threading
import time

import pytest
from django.core.management import CommandError, call_command
from django.db import connections

from tests.management.conftest import run_command, run_transfer
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


@pytest.fixture
def damaged(sql_backend):
    """A run that cannot be read as a whole, and of whose six states one cannot."""
    run = stored_run(sql_backend, id="damaged", workflow_name="w", status="running")
    for number in range(6):
        sql_backend.states.save_state(run.id, {"n": number}, f"node-{number}")
    sql_backend.runs.update_status(run.id, "failed", error_message="ValueError: no total")
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute("UPDATE workflow_runs SET inputs = '{no json' WHERE id = 'damaged'")
        cursor.execute(
            "UPDATE execution_states SET state_json = '{no json', state_delta = NULL "
            "WHERE run_id = 'damaged' AND step = 3"
        )
    return sql_backend


def test_a_run_that_cannot_be_read_is_shown_with_what_is_known(damaged, sql_url):
    out, err, error = run_transfer("show_run", "dam", "--backend", sql_url)

    for shown in ("damaged", "w", "failed", "node-5", "ValueError: no total"):
        assert shown in out
    assert err == ""
    assert error.startswith("Workflow run damaged is damaged: inputs cannot be read: ")
    assert error.endswith(" Run check_runs to see all that is.")
    for arguments in (["--follow"], ["--state=2"], ["--diff=1..2"], ["--compare=damaged"]):
        assert run_transfer("show_run", "dam", *arguments, "--backend", sql_url)[2] == error


def test_a_state_that_cannot_be_read_is_shown_as_that_and_the_others_are(damaged, sql_url):
    def shown(*arguments):
        out, _, error = run_transfer("show_run", "damaged", *arguments, "--backend", sql_url)
        assert "inputs cannot be read" in error
        assert "its state of step 3 cannot be rebuilt" in error
        return out

    states = json.loads(shown("--format=json"))["states"]
    assert [(one["step"], one["node_id"]) for one in states] == [
        (number, f"node-{number}") for number in range(6)
    ]
    assert [one["state_data"] for one in states[2:5]] == [{"n": 2}, None, {"n": 4}]
    assert states[3]["problem"].startswith("its state of step 3 cannot be rebuilt: ")
    assert {one["problem"] for one in states if one["step"] != 3} == {None}
    run, *lines = map(json.loads, shown("--format=jsonl", "--steps=2..3").splitlines())
    assert (run["id"], run["inputs"], [one["step"] for one in lines]) == ("damaged", None, [2, 3])
    rows = list(csv.DictReader(io.StringIO(shown("--format=csv", "--steps=3.."))))
    assert [(row["step"], row["state_data"]) for row in rows] == [
        ("3", ""),
        ("4", '{"n": 4}'),
        ("5", '{"n": 5}'),
    ]


def test_a_step_that_cannot_be_right_is_shown_without_what_is_wrong(source, sqlite_url):
    run = stored_run(source, status="running")
    for number in range(3):
        source.states.save_state(run.id, {"n": number}, f"node-{number}", tokens=7)
    with connections[source.alias].cursor() as cursor:
        cursor.execute("UPDATE execution_states SET tokens = 'x' WHERE step = 1")
        cursor.execute("UPDATE execution_states SET created_at = 'garbage' WHERE step = 2")
    source.runs.update_status(run.id, "completed")

    for arguments in ([], ["--format=jsonl"], ["--follow"], ["--steps=1..2"]):
        out, _, error = run_transfer("show_run", run.id, *arguments, "--backend", sqlite_url)
        assert "node-2" in out
        assert error == (
            f"Workflow run {run.id} is damaged: tokens of its step 1 cannot be right: 'x'; "
            "created_at of its step 2 cannot be right: None. Run check_runs to see all that is."
        )
    check = run_transfer("check_runs", "--backend", sqlite_url)
    assert "tokens of its step 1 cannot be right: 'x'" in check[0]
    assert check[2] == "2 problems found."


def test_a_run_in_redis_is_shown_though_its_attempts_and_states_are_damaged(target, redis_url):
    run = stored_run(target, id="damaged", status="running")
    for number in range(3):
        target.states.save_state(run.id, {"n": number}, f"node-{number}")
    for status in ("failed", "running", "failed"):
        target.runs.update_status(run.id, status)
    store = target.runs.store
    prefix = store.key_prefix(run.id)

    def damage():
        yield [
            ("HSET", f"{prefix}:states:{run.id}", "1", "{no"),
            ("HSET", f"{prefix}:run:{run.id}", "attempt:1", "{no"),
        ]

    store.execute(damage())

    out, _, error = run_transfer("show_run", run.id, "--format=json", "--backend", redis_url)

    shown = json.loads(out)
    assert [one["state_data"] for one in shown["states"]] == [{"n": 0}, None, {"n": 2}]
    assert shown["attempts"] == []
    assert "its attempts cannot be read: " in error
    assert "its state of step 1 cannot be rebuilt" in error
    assert "node-2" in run_transfer("show_run", run.id, "--backend", redis_url)[0]
