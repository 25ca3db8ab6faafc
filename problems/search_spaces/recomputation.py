"""Activation checkpointing (Chen et al. 2016): a cell's activations are computed again when a backward pass needs them.

`torch.utils.checkpoint` repeats a forward pass with whatever the module holds by then. Here other tensors take the
places of a module's parameters for the length of one pass, and running statistics may move only once. So the second
pass finds the module as the first one found it, and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """Calls a module so that of its tensors only arguments and results are kept for a backward pass.

    Values and derivatives of any order are those of the module, and random draws are repeated; each backward pass costs
    one more forward pass.

    Args:
        module: What to call; its parts stay in their places, their parameters and buffers need not.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> Recomputed(layer)(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._places = _Places(module)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        """Return what the module returns.

        Raises:
            RuntimeError: in the backward pass, if parameters have been written into since.
        """
        if not torch.is_grad_enabled():
            return self._module(*args)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _AsItWas(self._places)

        with _hooks_enabled():
            return checkpoint(self._module, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def _hooks_enabled() -> Iterator[None]:
    """Let tensors be packed where that is forbidden because most recomputation would find other parameters."""
    hooks = torch._C._autograd
    message = hooks._saved_tensors_hooks_get_disabled_error_message()
    if message is None:
        yield
        return
    hooks._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        hooks._saved_tensors_hooks_disable(message)


_Place = tuple[dict[str, Any], str]


class _Places:
    """Where a module holds what a forward pass reads and may write: parameters, buffers, whether statistics move."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._parameters: list[tuple[dict[str, Any], str]] = [
            (m._parameters, key) for m in parts for key in m._parameters
        ]
        self._buffers: list[tuple[dict[str, Any], str]] = [(m._buffers, key) for m in parts for key in m._buffers]
        self._norms: list[_Place] = [
            (owner._modules, key)
            for owner in parts
            for key, part in owner._modules.items()
            if isinstance(part, nn.modules.batchnorm._BatchNorm)
        ]

    @property
    def parameters(self) -> list[Tensor | None]:
        return [container[key] for container, key in self._parameters]

    @property
    def buffers(self) -> list[Tensor | None]:
        return [container[key] for container, key in self._buffers]

    @property
    def tracking(self) -> list[bool]:
        """Of each normalization; others may have been put in their places."""
        return [container[key].track_running_stats for container, key in self._norms]

    def fill(self, parameters: list[Tensor | None], buffers: list[Tensor | None], tracking: list[bool]) -> None:
        for (container, key), tensor in zip(self._parameters + self._buffers, parameters + buffers, strict=True):
            container[key] = tensor
        for (container, key), tracks in zip(self._norms, tracking, strict=True):
            container[key].track_running_stats = tracks


class _AsItWas(AbstractContextManager[None]):
    """A module holds again what it held when this was made, as often as it is entered."""

    def __init__(self, places: _Places) -> None:
        self._places = places
        self._parameters, self._tracking = places.parameters, places.tracking
        self._versions = [None if p is None else p._version for p in self._parameters]
        self._buffers = [None if b is None else b.clone() for b in places.buffers]

    def __enter__(self) -> None:
        if self._versions != [None if p is None else p._version for p in self._parameters]:
            raise RuntimeError(
                "recomputation: expected parameters as the forward pass read them; found some that have been written "
                "into since. Go back through a pass before the optimizer's step, or without checkpointing."
            )
        places = self._places
        self._present = places.parameters, places.buffers, places.tracking
        places.fill(self._parameters, self._buffers, self._tracking)

    def __exit__(self, *_: object) -> None:
        self._places.fill(*self._present)
