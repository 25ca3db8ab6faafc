"""What became of each run of a campaign, and the table that says it.

Called by `mlo.campaign.processes`, `mlo.campaign.slurm` and `mlo.cli`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class Status(enum.Enum):
    """What became of a run."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    WAITING = "waiting"
    SUBMITTED = "submitted"


_MEANINGS = {
    Status.DONE: "finished by this command",
    Status.SKIPPED: "was finished before",
    Status.INTERRUPTED: "saved",
    Status.WAITING: "not started",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        name: of the run.
        status: what became of it.
        note: of a failed run the last line of its error; of a submitted one its job.
        log: what the run wrote, where that is worth reading.
    """

    name: str
    status: Status
    note: str = ""
    log: Path | None = None


def format_outcomes(outcomes: Sequence[Outcome]) -> str:
    """Write a table with one run a line, and the counts below it."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = []
    for outcome in outcomes:
        note = outcome.note or _MEANINGS.get(outcome.status, "")
        lines.append(f"{outcome.name:<{width}}  {outcome.status.value:<11}  {note}".rstrip())
        if outcome.log is not None:
            lines.append(f"{'':<{width}}  {'':<11}  log: {outcome.log}")
    found = [outcome.status for outcome in outcomes]
    counts = [f"{found.count(status)} {status.value}" for status in Status if status in found]
    return "\n".join([*lines, "", f"{len(outcomes)} runs: {', '.join(counts)}"])
