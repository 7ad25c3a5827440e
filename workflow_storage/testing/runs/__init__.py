"""What the repository of runs promises, one class a promise.

`RunsContract` is all of it, for `StorageContract`; each part can be run alone, with the same
fixture ``backend``, while a repository is being written.
"""

from workflow_storage.testing.runs.adding import AddingContract
from workflow_storage.testing.runs.attempts import AttemptsContract
from workflow_storage.testing.runs.changing import ChangingContract
from workflow_storage.testing.runs.copying import CopyingContract
from workflow_storage.testing.runs.deleting import DeletingContract
from workflow_storage.testing.runs.exactness import ExactnessContract
from workflow_storage.testing.runs.finding import FindingContract
from workflow_storage.testing.runs.identity import IdentityContract
from workflow_storage.testing.runs.labels import LabelsContract
from workflow_storage.testing.runs.listing import ListingContract
from workflow_storage.testing.runs.stalled import StalledContract
from workflow_storage.testing.runs.summarizing import SummarizingContract

__all__ = [
    "AddingContract",
    "AttemptsContract",
    "ChangingContract",
    "CopyingContract",
    "DeletingContract",
    "ExactnessContract",
    "FindingContract",
    "IdentityContract",
    "LabelsContract",
    "ListingContract",
    "RunsContract",
    "StalledContract",
    "SummarizingContract",
]


class RunsContract(
    AddingContract,
    IdentityContract,
    ExactnessContract,
    LabelsContract,
    ListingContract,
    FindingContract,
    ChangingContract,
    AttemptsContract,
    DeletingContract,
    StalledContract,
    SummarizingContract,
    CopyingContract,
):
    """What `AbstractWorkflowRunRepository` promises."""
