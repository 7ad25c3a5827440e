"""How a run is suspended: an exception that its block swallows, for `run` and `ending`."""


class Suspended(BaseException):
    """A run is to wait; its block swallows it. An ``except Exception`` lets it pass.

    Attributes:
        run_id: which run.
        reason: for what it waits.
    """

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(run_id, reason)
        self.run_id = run_id
        self.reason = reason

    def __str__(self) -> str:
        return f"Workflow run {self.run_id} waits for: {self.reason}"
