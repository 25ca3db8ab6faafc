"""Which device to run on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mlo.errors import MloError


def check_device(name: str | torch.device) -> torch.device:
    """Return the torch device of a name.

    Raises:
        MloError: there is no such kind of device, or none of it here; says what is expected, not what was found.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise MloError("expected 'auto' or a torch device such as 'cpu' or 'cuda:0'") from error
    available = {
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, True):
        raise MloError("expected a device that torch can use here, such as 'auto' or 'cpu'")
    return device


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Compute as if the caller had not turned `torch.autocast` on for the device.

    Its casts of weights are kept until its end, however often the weights have been written into since.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def find_device(device: str | torch.device, modules: Sequence[nn.Module]) -> torch.device:
    """Return the named device, or for "auto" CUDA, else MPS (unless a module is in float64), else the CPU.

    Raises:
        MloError: as `check_device`, with what was found.
    """
    if device != "auto":
        try:
            return check_device(device)
        except MloError as error:
            raise MloError(f"device: {error}; found {str(device)!r}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    doubles = any(p.dtype == torch.float64 for module in modules for p in module.parameters())
    if torch.backends.mps.is_available() and not doubles:
        return torch.device("mps")
    return torch.device("cpu")
