"""Every error that the repositories and the factory raise, for callers to catch.

A message says first what is wrong, then what to do; it is written once, here.
All errors survive pickling, so they reach the caller of a task queue whole.
"""


class StorageError(Exception):
    """The root of every error of this package."""


class StorageUnavailableError(StorageError):
    """The store did not answer: it is down, unreachable, read-only, or locked past its timeout.

    Attributes:
        may_be_stored: whether what was to be written may have been: the connection broke off
            after it was sent, before the answer came. If not, it was not.
    """

    may_be_stored: bool = False


class TablesMissingError(StorageUnavailableError):
    """The database answers, but the tables are not there, or are of an older version."""

    def __init__(self, alias: str, name: str | None = None) -> None:
        """Say where the tables are missing.

        Args:
            alias: the alias of the database.
            name: its name or path, if it was given by URL or path, and the alias is ours.
        """
        super().__init__(alias, name)
        self.alias = alias
        self.name = name

    def __str__(self) -> str:
        if self.name is None:
            return (
                f"The tables of workflow_storage are missing or out of date in database "
                f"{self.alias!r}. Run: manage.py migrate --database {self.alias}"
            )
        return (
            f"The tables of workflow_storage are missing or out of date in database {self.name!r}. "
            "They were made when this process opened the store: find out what became of them, and "
            "start the process anew, which makes them where there are none."
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


class ReentranceError(StorageError):
    """An operation was begun in the middle of another one of its thread; nothing was done."""

    def __str__(self) -> str:
        return (
            "The store was called in the middle of another call of the same thread or task, which "
            "a signal handler, a log handler or a finalizer has interrupted. Let that note what it "
            "has to store, and store it once the other call has returned."
        )


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


class RunLostError(StatusConflictError):
    """The run is not, or no longer, the worker's that wrote to it; nothing was written.

    Attributes:
        attempt: the attempt that the worker is in.
        status: the status of the run; None if it has been deleted.
        current_attempt: the attempt that the run is in.
        worker: who is in that attempt, if that is known.
        since: since when.
    """

    def __init__(  # noqa: PLR0917 - what is pickled is what is passed by position
        self,
        run_id: str,
        attempt: int,
        status: str | None = None,
        current_attempt: int | None = None,
        worker: str | None = None,
        since: object = None,
    ) -> None:
        super().__init__(run_id, status or "deleted", ("running",))
        self.args = (run_id, attempt, status, current_attempt, worker, since)
        self.attempt = attempt
        self.status = status  # type: ignore[assignment]
        self.current_attempt = current_attempt
        self.worker = worker
        self.since = since

    def __str__(self) -> str:
        if self.status is None:
            what = "has been deleted"
        elif self.current_attempt == self.attempt:
            what = f"is {self.status}"
        else:
            by = f" on {self.worker}" if self.worker else ""
            since = f" since {self.since}" if self.since else ""
            what = f"was taken over by attempt {self.current_attempt}{by}{since}"
            if self.status != "running":
                what += f", and is {self.status}"
        return (
            f"Workflow run {self.run_id} {what}: attempt {self.attempt} is over, and wrote nothing "
            "more. Stop working on it."
        )


class NotResumableError(StatusConflictError):
    """The run cannot be resumed as it is; it is unchanged.

    Attributes:
        attempt: the attempt that the run is in.
        worker: who is in that attempt, if that is known.
        since: when it began, or when the run ended.
        last_sign: the last sign of life of a running run.
    """

    def __init__(  # noqa: PLR0917 - what is pickled is what is passed by position
        self,
        run_id: str,
        status: str,
        expected: tuple[str, ...],
        attempt: int,
        worker: str | None = None,
        since: object = None,
        last_sign: object = None,
    ) -> None:
        super().__init__(run_id, status, expected)
        self.args = (run_id, status, expected, attempt, worker, since, last_sign)
        self.attempt = attempt
        self.worker = worker
        self.since = since
        self.last_sign = last_sign

    def __str__(self) -> str:
        run = f"Workflow run {self.run_id} is {self.status}"
        since = f" since {self.since}" if self.since else ""
        if self.status == "running":
            by = f" on {self.worker}" if self.worker else ""
            return (
                f"{run} in attempt {self.attempt}{by}{since}; its last sign of life was at "
                f"{self.last_sign}. If nobody works on it any more, pass stalled_after=timedelta(…)"
                " to resume_run(): it takes over a run that gave no sign of life for longer."
            )
        if self.status == "completed":
            return f"{run}{since}: there is nothing to resume. Record a new run."
        return (
            f"{run}{since}: meanwhile another process has begun and ended attempt {self.attempt}. "
            "Resume it again if you want to be the next."
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


class StepNotFoundError(StorageError, ValueError):
    """A run has no checkpoint with that step."""

    def __init__(self, run_id: str, step: int) -> None:
        super().__init__(run_id, step)
        self.run_id = run_id
        self.step = step

    def __str__(self) -> str:
        return (
            f"Workflow run {self.run_id} has no checkpoint of step {self.step}. "
            "states.iter_steps() tells which there are; some may have been pruned."
        )


class DamagedStateError(StorageError):
    """A stored state cannot be rebuilt; earlier and later ones may be readable."""

    def __init__(
        self,
        run_id: str,
        step: int,
        reason: str,
        advice: str = (
            "Restore it from a backup of the database, or go on from another step with "
            "states.get_state()."
        ),
    ) -> None:
        super().__init__(run_id, step, reason, advice)
        self.run_id = run_id
        self.step = step
        self.reason = reason
        self.advice = advice

    def __str__(self) -> str:
        return (
            f"The state of workflow run {self.run_id} at step {self.step} cannot be rebuilt: "
            f"{self.reason}. {self.advice}"
        )


class DamagedFieldError(StorageError):
    """A stored JSON field of a row cannot be read; the database does not say of which row.

    Attributes:
        problem: what cannot be read, and why, in a sentence without its full stop.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.problem = f"{field} cannot be read: {reason}"

    def __str__(self) -> str:
        return f"{self.problem}. Run manage.py check_runs, which names the run."


class UnsupportedBackendError(StorageError, ValueError):
    """The configuration names no backend that there is."""


class NotInDatabaseError(StorageError):
    """A run that is in no Django database has no method that looks into one; nothing was done."""

    def __init__(self, run_id: str, method: str, instead: str) -> None:
        super().__init__(run_id, method, instead)
        self.run_id = run_id
        self.method = method
        self.instead = instead

    def __str__(self) -> str:
        return (
            f"{self.method} looks into a Django database, and workflow run {self.run_id} is in another "
            f"store: {self.instead}."
        )


class CannotMoveError(StorageError, ValueError):
    """Runs cannot be moved from a store to itself, or inside a transaction."""

    def __str__(self) -> str:
        return (
            "Runs cannot be moved inside a transaction, whose rollback would lose them. "
            "Move them outside of transaction.atomic() and ATOMIC_REQUESTS."
        )


class SameStoreError(CannotMoveError):
    """Runs cannot be copied or moved from a store to itself."""

    def __str__(self) -> str:
        return "The source and the target are the same store. Name another target."


class SnapshotError(StorageError):
    """A transaction cannot see what is in use by now, and would delete or fail it; nothing was written."""

    def __str__(self) -> str:
        return (
            "This deletes or fails what nobody uses, and cannot be done in a transaction that sees "
            "nothing that was stored since it began (REPEATABLE READ, SERIALIZABLE), for somebody may "
            "use it by now. Do it outside of transaction.atomic(), or in a READ COMMITTED transaction."
        )


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
