"""A store for each test of the recorder, on every backend."""

import pytest


@pytest.fixture
def backend(any_backend):
    return any_backend


def only_run(backend):
    (run,) = backend.runs.list_runs()
    return run
