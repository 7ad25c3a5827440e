"""``show_run``: a run and its states, all of them as JSON."""

import json

from tests.management.conftest import run_command
from workflow_storage.testing import stored_run


def test_show_run_prints_the_run_and_its_states(any_backend, any_url):
    run = stored_run(
        any_backend,
        status="failed",
        inputs={"file": "a.pdf", "\0": "\ud800"},
        error_message="it\nbroke",
    )
    any_backend.states.save_state(run.id, {"pages": 3, "\udfff": 1}, "ocr")

    text = run_command("show_run", run.id, backend=any_url)

    for shown in (run.id, '"file": "a.pdf"', "broke", "ocr", "pages"):
        assert shown in text
    text.encode()


def test_show_run_as_json_is_everything(any_backend, any_url):
    run = stored_run(any_backend, inputs={"x": [1e23, "\0"]})
    assert (
        json.loads(run_command("show_run", run.id, backend=any_url, format="json"))["states"] == []
    )
    for number in range(20):
        any_backend.states.save_state(run.id, {"n": number, "lone": "\ud800"}, f"node-{number}")

    shown = json.loads(run_command("show_run", run.id, backend=any_url, format="json"))

    assert shown["inputs"] == {"x": [1e23, "\0"]}
    assert shown["started_at"] == run.started_at.isoformat()
    assert [state["step"] for state in shown["states"]] == list(range(20))
    assert shown["states"][3]["state_data"] == {"n": 3, "lone": "\ud800"}


def test_show_run_with_many_states_names_the_rest(any_backend, any_url):
    run = stored_run(any_backend)
    for _ in range(51):
        any_backend.states.save_state(run.id, {}, "node")

    assert "the rest with --format json" in run_command("show_run", run.id, backend=any_url)
    any_backend.states.delete_states(run.id, keep_last=50)
    assert "the rest" not in run_command("show_run", run.id, backend=any_url)
