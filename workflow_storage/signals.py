"""What happens to recorded runs, as Django signals.

Sent by `record_run` and `resume_run` once the write is committed, with ``send_robust``: an
error of a receiver is logged and stops nobody. The sender is `RecordedRun`; every signal
has ``run``, the `RecordedRun`, and `checkpoint_saved` also has ``step`` and ``node_id``.
"""

from django.dispatch import Signal

run_started = Signal()
"""A run was begun or resumed."""

run_finished = Signal()
"""A run ended; ``run.status`` and ``run.error_message`` say how."""

checkpoint_saved = Signal()
"""A checkpoint was appended to a run."""
