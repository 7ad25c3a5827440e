"""Every error that the repositories and the factory raise, for callers to catch.

A message says first what is wrong, then what to do; it is written once, here.
All errors survive pickling, so they reach the caller of a task queue whole.
"""

from typing import Literal


class StorageError(Exception):
    """The root of every error of this package."""


class StorageUnavailableError(StorageError):
    """The store did not answer: it is down, unreachable, or locked past its timeout."""


class TablesMissingError(StorageUnavailableError):
    """The database answers, but the tables are not there, or are of an older version."""

    def __init__(self, alias: str) -> None:
        super().__init__(alias)
        self.alias = alias

    def __str__(self) -> str:
        return (
            f"The tables of workflow_storage are missing or out of date in database "
            f"{self.alias!r}. Run: manage.py migrate --database {self.alias}"
        )


class RunNotFoundError(StorageError, ValueError):
    """There is no run with that id."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return (
            f"Workflow run not found: {self.run_id}. "
            "Check the id, or store the run first with runs.add(run)."
        )


class RunAlreadyExistsError(StorageError, ValueError):
    """A run with that id is stored already; the stored one is untouched."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return (
            f"Workflow run already exists: {self.run_id}. "
            "Give the new run another id, or change the stored one with runs.update()."
        )


class InvalidFieldError(StorageError, ValueError):
    """A field's value cannot be stored as it is; nothing was written."""


class InvalidPayloadError(InvalidFieldError, TypeError):
    """A payload holds something that JSON has no form for; nothing was written."""


class InvalidStatusError(StorageError, ValueError):
    """Not the name of a status."""

    def __init__(self, status: object, allowed: tuple[str, ...]) -> None:
        super().__init__(status, allowed)
        self.status = status
        self.allowed = allowed

    def __str__(self) -> str:
        return f"Invalid run status: {self.status!r}. Use one of: {', '.join(self.allowed)}."


class StatusConflictError(StorageError, ValueError):
    """The run was not in an expected status; it is unchanged."""

    def __init__(self, run_id: str, status: str, expected: tuple[str, ...]) -> None:
        super().__init__(run_id, status, expected)
        self.run_id = run_id
        self.status = status
        self.expected = expected

    def __str__(self) -> str:
        return (
            f"Workflow run {self.run_id} is {self.status}, expected "
            f"{' or '.join(self.expected)}. Another process changed it; read it again."
        )


class RunChangedError(StorageError, ValueError):
    """A run, or its newest state, is not as it was read; nothing was written."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return (
            f"Workflow run {self.run_id} is not as it was read. "
            "Another process changed it; read it again."
        )


class StepConflictError(StorageError, ValueError):
    """A checkpoint with a given step does not follow the states of its run."""

    def __init__(self, run_id: str, step: int, next_step: int) -> None:
        super().__init__(run_id, step, next_step)
        self.run_id = run_id
        self.step = step
        self.next_step = next_step

    def __str__(self) -> str:
        return (
            f"The next step of workflow run {self.run_id} is {self.next_step}, not {self.step}. "
            "Append its states in order, beginning there."
        )


class DamagedStateError(StorageError):
    """A stored state cannot be rebuilt; earlier and later ones may be readable."""

    def __init__(self, run_id: str, step: int, reason: str) -> None:
        super().__init__(run_id, step, reason)
        self.run_id = run_id
        self.step = step
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"The state of workflow run {self.run_id} at step {self.step} cannot be rebuilt: "
            f"{self.reason}. Restore it from a backup of the database, or go on from another "
            "step with states.get_state()."
        )


class UnsupportedBackendError(StorageError, ValueError):
    """The configuration names no backend that there is."""


class CannotMoveError(StorageError, ValueError):
    """Runs cannot be moved from a store to itself, or inside a transaction."""

    _MESSAGES = {
        "transaction": (
            "Runs cannot be moved inside a transaction, whose rollback would lose them. "
            "Move them outside of transaction.atomic() and ATOMIC_REQUESTS."
        ),
        "same store": (
            "The source and the target are the same store. Name another target, or copy "
            "without moving."
        ),
    }

    def __init__(self, reason: Literal["transaction", "same store"]) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self._MESSAGES[self.reason]


class ExportFileError(StorageError):
    """A file cannot be read or written.

    Attributes:
        path: which file.
        reason: what the system says; None if it is a directory.
    """

    def __init__(self, path: str, reason: str | None = None) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        if self.reason is None:
            return f"{self.path} is a directory. Name a file in it."
        return f"{self.path}: {self.reason}. Check the path and the disk."
