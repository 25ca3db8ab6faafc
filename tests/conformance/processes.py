"""Two processes with gloo, for tests of what they do together."""

import os
from datetime import timedelta
from pathlib import Path

import torch


def in_two_processes(function, folder):
    """Call a function of a module's top level as function(rank, folder) in both; return what each returns.

    Each runs on one thread: those of two processes would spin against each other.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        torch.multiprocessing.spawn(_in_process, (function, str(folder)), nprocs=2)
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    return [torch.load(Path(folder) / f"results{rank}.pt") for rank in (0, 1)]


def _in_process(rank, function, folder):
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        torch.save(function(rank, folder), f"{folder}/results{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
