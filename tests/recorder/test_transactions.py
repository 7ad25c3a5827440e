"""Recordings inside a transaction of the caller."""

from django.db import transaction

from workflow_storage import record_run


def test_a_recording_in_a_transaction_saves_one_state_after_another(sql_backend):
    with transaction.atomic(sql_backend.alias), record_run("inside", backend=sql_backend) as run:
        for number in range(4):
            with run.node("node"):
                run.add_usage(tokens=1)
                run.save_state({"number": number})
        run.save_state({"text": "x" * 10_000}, "large")

    states = list(sql_backend.states.iter_state_history(run.run_id))
    assert [state["step"] for state in states] == [0, 1, 2, 3, 4]
    assert [state["state_data"].get("number") for state in states] == [0, 1, 2, 3, None]
    assert sql_backend.runs.get(run.run_id).total_tokens == 4
