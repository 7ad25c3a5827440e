"""The whole contract as one class of tests, for our backends and for anybody else's.

Subclass `StorageContract` and give it a fixture ``backend`` that yields an empty
`StorageBackend`. A fixture ``open_backend`` that returns a picklable callable, which opens
the same store again, adds the test that writes from several processes::

    class TestMyBackend(StorageContract):
        @pytest.fixture
        def open_backend(self, tmp_path):
            return functools.partial(open_my_store, str(tmp_path))

        @pytest.fixture
        def backend(self, open_backend):
            return open_backend()
"""

from workflow_storage.testing.asynchronous import AsyncContract
from workflow_storage.testing.concurrency import ConcurrencyContract
from workflow_storage.testing.encoded import EncodedContract
from workflow_storage.testing.fencing import FencingContract
from workflow_storage.testing.runs import RunsContract
from workflow_storage.testing.states import StatesContract
from workflow_storage.testing.usage import UsageContract


class StorageContract(
    RunsContract,
    StatesContract,
    EncodedContract,
    UsageContract,
    FencingContract,
    ConcurrencyContract,
    AsyncContract,
):
    """The whole contract; subclass it with a fixture ``backend``."""
