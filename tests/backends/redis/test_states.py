"""States: how much they take, and what is said of damaged and missing ones."""

from contextlib import suppress

import pytest
import redis

from tests.backends.redis.keys import keys_of
from workflow_storage import (
    DamagedStateError,
)
from workflow_storage.testing import changed_state, stored_run


def test_growing_states_take_little_more_than_the_last_one(backend):
    run = stored_run(backend)
    writer = backend.states.writer(run.id)
    state = {}
    for number in range(100):
        state = changed_state(state, "grow", 3000 + number)
        writer.save_state(state, "node")

    (states,) = keys_of(backend, "states:").values()
    assert sum(map(len, states.values())) < 3 * len(str(state))


def test_damage_is_an_error_and_the_run_goes_on(backend, caplog):
    run = stored_run(backend)
    state = {}
    for number in range(12):
        state = changed_state(state, "grow", 3000 + number)
        backend.states.save_state(run.id, state, "node")
    store = backend.runs.store
    for server in store.servers():
        with suppress(redis.ResponseError):
            key = f"{store.key_prefix(run.id)}:states:{run.id}"
            delta = bytearray(server.hget(key, 8))
            delta[len(delta) // 2] ^= 1
            server.hset(key, 8, bytes(delta))

    assert backend.states.get_state(run.id, 7) is not None
    for step in (8, 9, 11):
        with pytest.raises(DamagedStateError, match=f"at step {step} cannot be rebuilt"):
            backend.states.get_state(run.id, step)
    with pytest.raises(DamagedStateError, match="step 8"):
        backend.states.get_state_history(run.id)
    assert backend.states.save_state(run.id, state, "node") == 12
    assert backend.states.get_latest_state(run.id) == state
    assert "cannot serve as a base" in caplog.text
    assert backend.states.delete_states(run.id, keep_last=6) == 7
    assert backend.states.delete_states(run.id, keep_last=9) == 0
    assert backend.states.delete_states(run.id, keep_last=2) == 4
    assert backend.states.get_latest_state(run.id) == state


def test_states_that_were_deleted_by_hand_are_an_error(backend):
    run = stored_run(backend)
    for number in range(3):
        backend.states.save_state(run.id, {"n": number}, "node")
    store = backend.runs.store
    for server in store.servers():
        with suppress(redis.ResponseError):
            server.delete(f"{store.key_prefix(run.id)}:states:{run.id}")

    for call in (
        lambda: backend.states.get_latest_state(run.id),
        lambda: backend.states.get_state(run.id, 1),
        lambda: backend.states.get_state_history(run.id),
    ):
        with pytest.raises(DamagedStateError, match="the server has evicted it"):
            call()
    assert backend.states.save_state(run.id, {"n": 3}, "node") == 3
    assert backend.states.get_latest_state(run.id) == {"n": 3}
    assert backend.states.delete_states(run.id, keep_last=1) == 3
    assert backend.states.get_state_history(run.id)[0]["state_data"] == {"n": 3}
