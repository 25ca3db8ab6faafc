"""Modules under `torch.compile`, for passes whose graph may be gone through more than once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import nn


def compiled(module: nn.Module) -> Callable[..., Any]:
    """Return what to call in the place of a module; it compiles when it is called with what it has not yet seen.

    Forbids, in this process, that compiled backward passes write into what their forward passes saved ("donated
    buffers"): PyTorch then refuses to keep a graph, and looks the setting up when it compiles and when it goes back.
    Random draws are those of the module itself, which a hypergradient may call for the same step.
    """
    torch._functorch.config.donated_buffer = False
    return torch.compile(module, options={"fallback_random": True})
