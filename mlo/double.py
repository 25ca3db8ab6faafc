"""Everything in float64 for a while, whatever precision the modules, batches and losses were written for.

Used by `Engine.check`, whose differences of a loss at radii of 1e-6 and less mean nothing in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from mlo.trees import map_tensors

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)


@contextmanager
def in_double(parts: Iterable[tuple[nn.Module, Optimizer]]) -> Iterator[None]:
    """Let float64 copies take the place of all parameters, buffers and optimizer states within the block.

    The parameters stay the same objects. Afterwards every tensor is back, the same one, untouched.
    """
    with ExitStack() as stack:
        for module, optimizer in parts:
            for parameter in module.parameters():
                stack.callback(_put_back, parameter, parameter.data, parameter.grad)
                parameter.grad = None
                parameter.data = double(parameter.data.clone())
            for part in module.modules():
                for key, buffer in part._buffers.items():
                    stack.callback(part._buffers.__setitem__, key, buffer)
                    part._buffers[key] = None if buffer is None else double(buffer.clone())
            stack.callback(_put_back_state, optimizer, {p: dict(own) for p, own in optimizer.state.items()})
            for own in optimizer.state.values():
                own.update({k: _double_state(k, v) for k, v in own.items()})
        yield


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss, or another function of levels, that computes in float64 throughout, also where less is asked for.

    It is given its batch in float64.
    """

    def compute(*args: Any) -> Any:
        with _Double():
            return function(*map_tensors(args, double))

    return compute


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 if it is of another real floating-point kind."""
    return tensor.double() if tensor.dtype in _NARROW else tensor


class _Double(TorchFunctionMode):
    """Gives torch functions float64 for all narrower arguments and wanted types, and takes nothing narrower back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in _NARROWING else func
        # A tensor that is written into, or whose attribute is looked up, must be the very tensor.
        first, rest = (args[:1], args[1:]) if _needs_itself(func.__name__) else ((), args)
        result = func(*first, *_widened(rest), **_widened(kwargs or {}))
        return map_tensors(result, double)


def _needs_itself(name: str) -> bool:
    return name in {"__get__", "__set__", "__setitem__"} or name.startswith("__i") or name[-1:] == "_" != name[-2:-1]


def _widened(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return double(tree)
    if isinstance(tree, torch.dtype):
        return torch.float64 if tree in _NARROW else tree
    if isinstance(tree, (list, tuple)) and type(tree) in {list, tuple}:
        return type(tree)(map(_widened, tree))
    if type(tree) is dict:
        return {key: _widened(value) for key, value in tree.items()}
    return tree


def _double_state(key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if key == "step" else double(value.clone())


def _put_back(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    parameter.grad = None
    parameter.data = data
    parameter.grad = grad


def _put_back_state(optimizer: Optimizer, saved: dict[Tensor, dict[str, Any]]) -> None:
    optimizer.state.clear()
    optimizer.state.update(saved)
