"""Which process is started when, with processes that take a fraction of a second in place of runs."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mlo.campaign import Status, format_outcomes, run_here
from mlo.campaign.worker import Worker

GOOD = "open('result.json', 'w').write('{}')"
BAD = "print('working'); raise ValueError('it broke')"
ONCE = f"import os\nif os.path.exists('mark'): {GOOD}\nelse: open('mark', 'w'); raise ValueError('it broke')"
SILENT = "raise SystemExit(3)"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
SAVING = """
import pathlib, signal, sys, time
def save(*_):
    open('saved', 'w')
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
open('begun', 'w')
time.sleep(60)
"""


def execute(tmp_path, scripts, *, jobs=2, retries=0, say=lambda _: None):
    folders = {name: tmp_path / name for name in scripts}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)

    def worker(folder, retries):
        script = folder / "script.py"
        script.write_text(f"import os; os.chdir({str(folder)!r})\n{scripts[folder.name]}")
        return Worker(folder, retries, [sys.executable, "-S", str(script)])

    return run_here(folders, jobs=jobs, retries=retries, say=say, worker=worker)


def statuses(execution):
    return {name: outcome.status for name, outcome in execution.outcomes.items()}


def test_one_that_fails_does_not_stop_the_others(tmp_path):
    said = []
    found = execute(tmp_path, {"a": BAD, "b": GOOD, "c": SILENT, "d": KILLED, "e": GOOD}, say=said.append)
    assert statuses(found) == {
        "a": Status.FAILED, "b": Status.DONE, "c": Status.FAILED, "d": Status.FAILED, "e": Status.DONE,
    }  # fmt: skip
    assert [found.outcomes[name].note for name in "acd"] == [
        "ValueError: it broke", "exit status 3, without a message", "ended by SIGKILL; out of memory?",
    ]  # fmt: skip
    assert "working" in found.outcomes["a"].log.read_text()
    assert found.interruption is None
    assert len(said) == 5
    assert "(5 of 5)" in said[-1]
    table = format_outcomes(list(found.outcomes.values()))
    assert "a  failed       ValueError: it broke" in table
    assert f"log: {tmp_path / 'a' / 'log.txt'}" in table
    assert "5 runs: 2 done, 3 failed" in table


def test_what_is_done_is_skipped(tmp_path):
    execute(tmp_path, {"a": GOOD})
    found = execute(tmp_path, {"a": BAD, "b": GOOD})
    assert statuses(found) == {"a": Status.SKIPPED, "b": Status.DONE}


@pytest.mark.parametrize(("script", "retries", "status", "tries"), [
    (ONCE, 0, Status.FAILED, 1), (ONCE, 1, Status.DONE, 2), (BAD, 2, Status.FAILED, 3), (GOOD, 2, Status.DONE, 1),
])  # fmt: skip
def test_retries(tmp_path, script, retries, status, tries):
    found = execute(tmp_path, {"a": script}, retries=retries)
    assert statuses(found) == {"a": status}
    assert (tmp_path / "a" / "log.txt").read_text().count("--- ") == tries


def test_as_many_at_a_time_as_asked_for(tmp_path):
    script = f"""
import time
with open('../events', 'a') as f: f.write('+')
time.sleep(0.2)
with open('../events', 'a') as f: f.write('-')
{GOOD}"""
    execute(tmp_path, dict.fromkeys("abcdef", script), jobs=3)
    depth = most = 0
    for event in (tmp_path / "events").read_text():
        depth += 1 if event == "+" else -1
        most = max(most, depth)
    assert most == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_and_starts_no_more(tmp_path, number):
    def send():
        deadline = time.monotonic() + 20
        while not ((tmp_path / "a" / "begun").exists() and (tmp_path / "b" / "begun").exists()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    if signal.getsignal(number) is signal.SIG_IGN:  # as under nohup, where it is left alone
        signal.signal(number, signal.SIG_DFL)
    handler = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    said = []
    found = execute(tmp_path, {"a": SAVING, "b": SAVING, "c": GOOD}, retries=5, say=said.append)
    thread.join()
    assert statuses(found) == {"a": Status.INTERRUPTED, "b": Status.INTERRUPTED, "c": Status.WAITING}
    assert (tmp_path / "a" / "saved").exists()
    assert (tmp_path / "b" / "saved").exists()
    assert not (tmp_path / "c" / "log.txt").exists()
    assert found.interruption.signal_number == number
    assert signal.getsignal(number) is handler
    assert "2 processes save and end" in said[0]


def children():
    """The processes that this one has started, those that have ended and were not waited for included."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_an_error_here_leaves_no_process_behind(tmp_path):
    """Such as a full disk."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "log.txt").mkdir()
    before = children()
    with pytest.raises(IsADirectoryError):
        execute(tmp_path, {"a": SAVING, "b": GOOD})
    assert children() <= before
