"""One run in a process of its own, with its log: what both ways of running a campaign have in common.

The process is `python -m mlo resume FOLDER`, for a run that has not begun too. It is stopped by SIGTERM: a process that
is still importing ends at once, one that trains saves first, and unlike SIGINT it is not ignored by what a shell starts
in the background. Called by `mlo.campaign.processes` and `mlo.campaign.slurm`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlo.launching import same_path
from mlo.runs import is_finished

LOG = "log.txt"
_STOPPED = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM)


class Worker:
    """The processes of one run, one after another.

    Args:
        folder: of the run, laid out.
        retries: how often a process that failed is followed by another, which goes on from the newest checkpoint.
        command: of a process; `mlo resume` by default.
    """

    def __init__(self, folder: Path, retries: int, command: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.log = folder / LOG
        self._retries = retries
        self._command = command or [sys.executable, "-m", "mlo", "resume", str(folder), "--quiet"]
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def start(self) -> None:
        """Start a process, which adds to the log of those before it."""
        with self.log.open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(self._command)}\n".encode())
            log.flush()
            # A session of its own: Ctrl-C in the terminal reaches the campaign alone, which then stops its processes.
            with _blocking_preemption():
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, **same_path()},
                )
        if self._stopping:  # asked while the process was being made
            self.stop()

    def is_over(self) -> bool:
        """Whether the run is done, was stopped, or has failed for good; starts the next process after a failure."""
        assert self._process is not None, "started"
        code = self._process.poll()
        if code is None:
            return False
        if self.succeeded or self.stopped or self._retries == 0:
            return True
        self._retries -= 1
        self.start()
        return False

    def stop(self) -> None:
        """Ask the process to save and end; asked again, it ends without saving."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait for the end of the process, if one was started."""
        if self._process is not None:
            self._process.wait()

    def await_end(self) -> None:
        """Wait for the end of the process from within a handler of a signal.

        Popen's own methods share a lock with the poll that the signal may have interrupted.
        """
        assert self._process is not None, "started"
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)

    @property
    def succeeded(self) -> bool:
        """Whether the run has its result, and the last process ended well."""
        return self._code == 0 and is_finished(self.folder)

    @property
    def stopped(self) -> bool:
        """Whether the run was asked to stop, by whomever."""
        return self._stopping or self._code in _STOPPED

    def error(self) -> str:
        """Say in a line why the last process failed: the last line of its log, or the signal that ended it."""
        code = self._code
        if code is not None and code < 0:
            hint = "; out of memory?" if code == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{hint}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"exit status {code}, without a message" if last.startswith("--- ") else last

    @property
    def _code(self) -> int | None:
        return None if self._process is None else self._process.returncode


@contextmanager
def _blocking_preemption() -> Iterator[None]:
    """Start a process that SIGUSR2 does not end: Slurm sends it to all processes of a job, and one answers for all."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
