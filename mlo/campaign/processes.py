"""The runs of a campaign on this machine: a few processes at a time, until all are done or Ctrl-C.

Called by `mlo.cli`.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from mlo.campaign.outcomes import Outcome, Status
from mlo.campaign.worker import Worker
from mlo.runs import Interrupted, is_finished

_INTERVAL = 0.1  # seconds between two looks at the processes


@dataclass
class Execution:
    """What `run_here` has come to.

    Attributes:
        outcomes: of the runs so far, by name.
        interruption: what stopped it, if anything did.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    interruption: Interrupted | None = None


def run_here(
    folders: Mapping[str, Path],
    *,
    jobs: int,
    retries: int,
    say: Callable[[str], object],
    worker: Callable[[Path, int], Worker] = Worker,
) -> Execution:
    """Run what is not done, `jobs` processes at a time; a run that fails does not keep the others from going on.

    SIGINT and SIGTERM stop the processes, which save. A second signal ends them at once.

    Args:
        folders: of the runs by their names, laid out.
        jobs: processes at a time.
        retries: how often a run that failed is started again.
        say: told of every run that ends.
        worker: makes what runs one run.

    Returns:
        The outcome of every run, in the order of `folders`, and what stopped them, if anything did.
    """
    found: dict[str, Outcome] = {}
    for name, folder in folders.items():
        if is_finished(folder):
            found[name] = Outcome(name, Status.SKIPPED)
    waiting = [name for name in folders if name not in found]
    at_work: dict[str, Worker] = {}
    with _stopping(at_work, say) as signals:
        while at_work or (waiting and not signals):
            while waiting and len(at_work) < jobs and not signals:
                name = waiting.pop(0)
                at_work[name] = worker(folders[name], retries)
                at_work[name].start()
            for name in [name for name, each in at_work.items() if each.is_over()]:
                found[name] = _outcome(name, at_work.pop(name))
                say(f"{found[name].status.value:<11}  {name}  ({len(found)} of {len(folders)})")
            time.sleep(_INTERVAL)
    found |= {name: Outcome(name, Status.WAITING) for name in waiting}
    return Execution({name: found[name] for name in folders}, Interrupted(signals[0]) if signals else None)


def _outcome(name: str, worker: Worker) -> Outcome:
    if worker.succeeded:
        return Outcome(name, Status.DONE)
    if worker.stopped:
        return Outcome(name, Status.INTERRUPTED)
    return Outcome(name, Status.FAILED, worker.error(), worker.log)


@contextmanager
def _stopping(at_work: Mapping[str, Worker], say: Callable[[str], object]) -> Iterator[list[int]]:
    """Pass signals on to the processes; gives the list of those that came."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals  # signals are the main thread's
        return

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        signals.append(number)
        if len(signals) == 1 and at_work:
            say(f"stopping: {len(at_work)} processes save and end (again to end them at once) ...")
        for worker in list(at_work.values()):
            worker.stop()

    previous = {number: signal.signal(number, stop) for number in _signals()}
    try:
        yield signals
    finally:
        for worker in at_work.values():  # none, unless an error ended the loop
            worker.stop()
            worker.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signals() -> list[signal.Signals]:
    found = [signal.SIGINT, signal.SIGTERM]
    # A closed terminal would leave the processes behind, which are in sessions of their own; nohup means to go on.
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found
