"""Commands that run in several processes: started by `torchrun`, or by `--launch`.

    torchrun --nproc-per-node=2 -m mlo run lbt/digits
    mlo run lbt/digits --launch 2

Called by the command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mlo.errors import MloError


def is_launched() -> bool:
    """Return whether `torchrun` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def start_processes(num_processes: int | None) -> None:
    """Replace this process by `torchrun` with so many processes of the same command, unless it is one of them.

    Raises:
        MloError: on Windows, which cannot replace processes so.
    """
    if num_processes is None or num_processes == 1 or is_launched():
        return
    if sys.platform == "win32":
        raise MloError("--launch: expected a system with exec; found Windows. Use torchrun -m mlo run ...")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", "mlo", *_without_launch(sys.argv[1:])])


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
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
