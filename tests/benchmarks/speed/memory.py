"""The peak memory of one method at one size, in a process of its own.

What is measured is the process' resident memory, since that is what a user runs out of: tensors, but also the nodes of
autograd graphs and Python's own objects, which a count of torch's allocations leaves out. The high-water mark of the
kernel (`VmHWM`) is reset after everything is built and the smallest size was run once, so that libraries loaded late
and memory of thread pools do not count. `resource.getrusage` would not do: a process that was started by a big one
begins with its parent's mark, and the mark cannot be reset, so that small differences hide below what loading took.
"""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .timing import Method, guarded

PROCESS = Path("/proc/self")
MEASURABLE = (PROCESS / "clear_refs").exists()


def mebibytes(path: Path, line: str) -> float:
    """Return what a line of one of the kernel's tables says in KiB, in MiB."""
    lines = path.read_text().splitlines()
    return int(next(text for text in lines if text.startswith(f"{line}:")).split()[1]) / 1024


def resident(line: str) -> float:
    """Return a line of the process' status, "VmRSS" (now) or "VmHWM" (the peak), in MiB."""
    return mebibytes(PROCESS / "status", line)


def available() -> float:
    """Return how many MiB new work can have before the machine runs out of memory."""
    return mebibytes(Path("/proc/meminfo"), "MemAvailable")


def peak_here(method: Method, size: int, smallest: int) -> tuple[float | None, str]:
    """Return how many MiB this process needs above what it holds when all is built, and an error, if any."""
    torch.set_num_threads(1)
    _, error = guarded(lambda: method.prepare(smallest)(1))
    work, error = guarded(method.prepare, size) if not error else (None, error)
    if error:
        return None, error
    gc.collect()
    (PROCESS / "clear_refs").write_text("5")
    before = resident("VmRSS")
    _, error = guarded(work, 1)
    return (None, error) if error else (max(resident("VmHWM") - before, 0.0), "")


def peak(method: Method, size: int, smallest: int) -> tuple[float | None, str]:
    """Return the same of a new process; None without an error where this machine cannot measure it.

    A process that the system kills for its memory gives the error of the pool.
    """
    if not MEASURABLE:
        return None, ""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found, error = guarded(pool.submit(peak_here, method, size, smallest).result)
    return (None, error) if error else found
