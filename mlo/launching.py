"""Commands that run in several processes: started by `torchrun`, or by `--launch`.

    torchrun --nproc-per-node=2 $(which mlo) run lbt/digits
    mlo run lbt/digits --launch 2

Called by the command line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlo.distributed import as_told
from mlo.errors import MloError

if torch.distributed.is_available():  # not in every build of PyTorch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.rendezvous import rendezvous


def is_launched() -> bool:
    """Return whether `torchrun`, or what sets the same variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _missing()


def check_variables() -> None:
    """Refuse a process that was started as one of several without all variables that they find each other by.

    Raises:
        MloError: naming what is missing.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "LOCAL_RANK"} & os.environ.keys()
    if started and (missing := _missing()):
        raise MloError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected the variables that torchrun sets; found no "
            f"{' and no '.join(missing)}. Start the processes with torchrun, or set them all."
        )


def _missing() -> list[str]:
    return [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]


def same_path() -> dict[str, str]:
    """Return the variables that let `python -m mlo` look for modules where this process does (from Python 3.11 on).

    It would look in the present folder first, which the command `mlo` leaves out.
    """
    return {} if {"", str(Path.cwd())} & set(sys.path) else {"PYTHONSAFEPATH": "1"}


def processes_here() -> int:
    """Return how many processes of the job there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start_processes(num_processes: int | None) -> None:
    """Start so many processes of the same command under `torchrun` and end with them, unless this is one of them.

    Exits with 0 if all succeeded, with 128 + the signal's number if one stopped them, with what the first process that
    failed ended with otherwise.

    Raises:
        MloError: a process was killed, or ended with a status that no command of mlo ends with.
    """
    if num_processes is None or num_processes == 1 or is_launched():
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
    arguments = ["--standalone", f"--nproc-per-node={num_processes}", "-m", "mlo", *_without_launch(sys.argv[1:])]
    os.environ.update(same_path())
    sys.stdout.flush()
    logging.disable(logging.ERROR)  # each process has said what there is to say
    try:
        torchrun.run(torchrun.parse_args(arguments))  # type: ignore[no-untyped-call]
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except KeyboardInterrupt:  # before there were processes
        sys.exit(128 + signal.SIGINT)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise MloError(
                f"process {rank} of {num_processes} was killed (signal {-failure.exitcode}). If the run "
                f"had begun, go on with mlo resume"
            ) from None
        if failure.exitcode not in _OWN:
            raise MloError(
                f"process {rank} of {num_processes} ended by itself, with status {failure.exitcode}. If the run had "
                f"begun, go on with mlo resume"
            ) from None
        sys.exit(failure.exitcode)
    sys.exit(0)


_OWN = (1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""What a command that fails, or is interrupted, ends with, after it has said why."""


def _without_launch(arguments: Sequence[str]) -> list[str]:
    kept, skips = [], False
    for argument in arguments:
        if not (skips or argument == "--launch" or argument.startswith("--launch=")):
            kept.append(argument)
        skips = argument == "--launch"
    return kept


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that `torchrun` started, if there are any, within the block."""
    if not is_launched():
        yield
        return
    number = int(os.environ["LOCAL_RANK"])
    if number < torch.cuda.device_count():
        torch.cuda.set_device(number)
    store, rank, num_processes = next(iter(rendezvous("env://")))
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=num_processes
    )
    try:
        yield
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun, once it sees one gone; there is something to say
        told = str(as_told(error))
        if rank == 0:
            store.set(_SAID, told)
        elif isinstance(error, MloError | OSError) and _was_said(store, told):
            sys.exit(2)
        raise
    finally:
        torch.distributed.destroy_process_group()
        # A thread of gloo's that still has the tensors of the last message to let go of, and finds the interpreter
        # gone, aborts the process: it needs the interpreter's lock once more.
        time.sleep(0.2)


_SAID = "mlo: what the first process ended with"


def _was_said(store: Any, message: str) -> bool:
    """Whether the first process ends, within a second, with the same message."""
    last = time.monotonic() + 1
    try:
        while not store.check([_SAID]):  # `wait` says that it has waited in vain
            if time.monotonic() > last:
                return False
            time.sleep(0.05)
        return bool(store.get(_SAID) == message.encode())
    except RuntimeError:  # the process that holds the store has gone
        return False
