"""What is in the keys of a store, read past it; for tests that write through it."""

import json


def keys_of(backend, kind):
    """Return the keys of a kind, and what each holds."""
    found = {}
    for server in backend.runs.store.servers():
        for key in server.scan_iter(match=f"{{{backend.runs.store.prefix}*", count=1000):
            name = key.decode()
            if f"}}:{kind}" in name:
                found[name] = (
                    server.zrange(key, 0, -1)
                    if server.type(key) == b"zset"
                    else server.hgetall(key)
                )
    return found


def assert_indexes_agree(backend):
    """Check that every run is in the indexes it belongs to, and in no other."""
    expected = set()
    for key, run in keys_of(backend, "run:").items():
        base, _, run_id = key.partition(":run:")
        status, name, start = (
            run[field].decode() for field in (b"status", b"workflow_name", b"started_at")
        )
        expected |= {
            (f"{base}:runs:{status}", f"{start} {run_id}"),
            (f"{base}:workflows:{status}", f"{name}\0{start} {run_id}"),
        }
        for label, value in json.loads(run.get(b"labels", b"{}")).items():
            expected.add((f"{base}:labels", f"{label}\0{value}\0{start} {run_id}"))
        if b"parent_id" in run:
            expected.add((f"{base}:parents", f"{run[b'parent_id'].decode()}\0{start} {run_id}"))
        if b"completed_at" in run:
            entry = f"{run[b'completed_at'].decode()} {run_id}"
            expected |= {
                (f"{base}:ended:{status}", entry),
                (f"{base}:ended_workflows:{status}", f"{name}\0{entry}"),
            }
    found = {
        (key, entry.decode())
        for kind in ("runs:", "workflows:", "ended", "labels", "parents")
        for key, entries in keys_of(backend, kind).items()
        for entry in entries
    }
    assert found == expected


def assert_attempts_are_whole(backend):
    """Check that the attempts of each run that are kept are those that are there, once each."""
    for run in keys_of(backend, "run:").values():
        kept = [int(number) for number in run.get(b"attempts", b"").split()]
        assert len(kept) == len(set(kept))
        assert all(0 < number <= int(run[b"attempt"]) for number in kept)
        there = {field for field in run if field.startswith(b"attempt:")}
        assert there == {b"attempt:%d" % number for number in kept}


def assert_states_are_whole(backend):
    runs = {key.partition(":run:")[2] for key in keys_of(backend, "run:")}
    assert {key.partition(":states:")[2] for key in keys_of(backend, "states:")} <= runs
    for run_id in runs:
        steps = [state["step"] for state in backend.states.iter_state_history(run_id)]
        assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True
