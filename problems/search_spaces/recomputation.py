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


class _Places:
    """Where a module holds the tensors that a forward pass reads and may write: parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        parts = list(module.modules())
        self._parameters: list[tuple[dict[str, Any], str]] = [
            (m._parameters, key) for m in parts for key in m._parameters
        ]
        self._buffers: list[tuple[dict[str, Any], str]] = [(m._buffers, key) for m in parts for key in m._buffers]

    @property
    def parameters(self) -> list[Tensor | None]:
        return [container[key] for container, key in self._parameters]

    @property
    def buffers(self) -> list[Tensor | None]:
        return [container[key] for container, key in self._buffers]

    def fill(self, parameters: list[Tensor | None], buffers: list[Tensor | None]) -> None:
        for (container, key), tensor in zip(self._parameters + self._buffers, parameters + buffers, strict=True):
            container[key] = tensor


_Settings = list[tuple[nn.Module, str, bool]]
"""Of each part, whether it is in training mode, and of each normalization, whether its statistics move."""


def _settings(module: nn.Module) -> _Settings:
    parts = list(module.modules())  # others may have been put in their places since the module was made
    norms = [m for m in parts if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [(m, "training", m.training) for m in parts] + [
        (m, "track_running_stats", m.track_running_stats) for m in norms
    ]


def _apply(settings: _Settings) -> None:
    for module, name, value in settings:
        if getattr(module, name) != value:
            setattr(module, name, value)


class _AsItWas(AbstractContextManager[None]):
    """A module holds again what it held when this was made, as often as it is entered."""

    def __init__(self, places: _Places) -> None:
        self._places = places
        self._parameters, self._settings = places.parameters, _settings(places.module)
        self._versions = [None if p is None else p._version for p in self._parameters]
        self._buffers = [None if b is None else b.clone() for b in places.buffers]

    def __enter__(self) -> None:
        if self._versions != [None if p is None else p._version for p in self._parameters]:
            raise RuntimeError(
                "recomputation: expected parameters as the forward pass read them; found some that have been written "
                "into since. Go back through a pass before the optimizer's step, or without checkpointing."
            )
        places = self._places
        self._present = places.parameters, places.buffers
        self._present_settings = [(m, name, getattr(m, name)) for m, name, _ in self._settings]
        places.fill(self._parameters, [None if b is None else b.clone() for b in self._buffers])
        _apply(self._settings)

    def __exit__(self, *_: object) -> None:
        self._places.fill(*self._present)
        _apply(self._present_settings)
