"""The hash of a run."""

from contextlib import suppress

import pytest
import redis

from workflow_storage import (
    StorageError,
)
from workflow_storage.testing import stored_run


def test_a_run_that_cannot_be_read_is_an_error_that_names_it(backend):
    run = stored_run(backend)
    store = backend.runs.store
    for server in store.servers():
        with suppress(redis.ResponseError):
            server.hset(f"{store.key_prefix(run.id)}:run:{run.id}", "inputs", "{")
    with pytest.raises(StorageError, match=f"{run.id} cannot be read"):
        backend.runs.get(run.id)
