"""The contract as a pytest suite, and what tests of a store are written with.

For authors of backends, who run `StorageContract` against theirs (see the README beside this
file), and for our own tests. Needs pytest and hypothesis, which are in the extra ``test``.
"""

# ruff: noqa: E402 - pytest has to know before the import which asserts to explain

import pkgutil

import pytest

# Of its own accord it explains only those of test modules, conftest.py and plugins.
pytest.register_assert_rewrite(
    *(f"{__name__}.{room.name}" for room in pkgutil.iter_modules(__path__))
)

from workflow_storage.testing.asynchronous import AsyncContract
from workflow_storage.testing.concurrency import ConcurrencyContract
from workflow_storage.testing.contract import StorageContract
from workflow_storage.testing.encoded import EncodedContract
from workflow_storage.testing.fencing import FencingContract
from workflow_storage.testing.fixtures import memory_storage
from workflow_storage.testing.runs import (
    AddingContract,
    AttemptsContract,
    ChangingContract,
    CopyingContract,
    DeletingContract,
    ExactnessContract,
    FindingContract,
    IdentityContract,
    LabelsContract,
    ListingContract,
    RunsContract,
    StalledContract,
    SummarizingContract,
)
from workflow_storage.testing.sample_runs import (
    NOT_TERMINAL,
    STATUSES,
    TERMINAL,
    ids,
    new_run,
    newest_first,
    read_run,
    stored_run,
)
from workflow_storage.testing.states import StatesContract
from workflow_storage.testing.threads import in_threads, outcome
from workflow_storage.testing.usage import UsageContract
from workflow_storage.testing.values import (
    AWKWARD_VALUES,
    NOT_JSON,
    NotJSON,
    StateChange,
    against_the_store,
    any_text,
    changed_state,
    in_json,
    json_objects,
    json_values,
    nested,
    state_changes,
    storable_text,
)

__all__ = [
    "AWKWARD_VALUES",
    "NOT_JSON",
    "NOT_TERMINAL",
    "STATUSES",
    "TERMINAL",
    "AddingContract",
    "AsyncContract",
    "AttemptsContract",
    "ChangingContract",
    "ConcurrencyContract",
    "CopyingContract",
    "DeletingContract",
    "EncodedContract",
    "ExactnessContract",
    "FencingContract",
    "FindingContract",
    "IdentityContract",
    "LabelsContract",
    "ListingContract",
    "NotJSON",
    "RunsContract",
    "StalledContract",
    "StateChange",
    "StatesContract",
    "StorageContract",
    "SummarizingContract",
    "UsageContract",
    "against_the_store",
    "any_text",
    "changed_state",
    "ids",
    "in_json",
    "in_threads",
    "json_objects",
    "json_values",
    "memory_storage",
    "nested",
    "new_run",
    "newest_first",
    "outcome",
    "read_run",
    "state_changes",
    "storable_text",
    "stored_run",
]
