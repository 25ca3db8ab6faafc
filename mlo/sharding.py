"""Levels whose parameters are sharded over processes, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

A level's variables are then the shards that this process holds, plain tensors. FSDP gathers the whole parameters from
them when the module is called and scatters gradients when `backward` reaches them, so that such a level is evaluated in
place: other values are copied into the shards and the present ones back afterwards, and gradients are read from
`.grad`. That gives first derivatives only.

Each process has batches of its own, and a loss is the mean over them: FSDP averages the gradients of shards, and
`mlo.autodiff` those of all other variables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlo.arithmetic import Tensors
from mlo.distributed import Group
from mlo.errors import GraphError
from mlo.levels import LevelView, Undo, Variables
from mlo.trees import map_tensors


class ShardedVariables(Variables):
    """The shards that this process holds of a module's trainable parameters."""

    sharded = True

    def __init__(self, module: nn.Module) -> None:
        self._parts = _fsdp_modules(module)
        self.reshard()
        super().__init__(module)
        self.group = _mesh(self.parameters[0]).get_group()

    @property
    def tensors(self) -> Tensors:
        """The shards, in the memory of the parameters."""
        return tuple(local(p.detach()) for p in self.parameters)

    def bind(self, tensors: Tensors, undo: Undo) -> None:
        """Let the shards have the values of `tensors` until the end of `undo`; FSDP gathers parameters anew."""
        shards = self.tensors
        moved = any(t.data_ptr() != s.data_ptr() for t, s in zip(tensors, shards, strict=True))
        kept = tuple(s.clone() for s in shards) if moved else ()

        def put_back() -> None:
            if moved:
                _write(shards, kept)
            self.reshard()

        undo.callback(put_back)
        if moved:
            _write(shards, tensors)
        self.reshard()

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor | None]]:
        """Fill the list that the block gets with the gradients of what `backward` is called on in it."""
        kept = [p.grad for p in self.parameters]
        found: list[Tensor | None] = []
        try:
            for p in self.parameters:
                p.grad = None
            yield found
            found += [None if p.grad is None else local(p.grad) for p in self.parameters]
        finally:
            for p, grad in zip(self.parameters, kept, strict=True):
                p.grad = grad

    def like_parameter(self, index: int, tensor: Tensor) -> Tensor:
        """Make a shard part of a `DTensor` laid out as the parameter is."""
        from torch.distributed.tensor import DTensor  # noqa: PLC0415, it takes long and is rarely needed

        p: Any = self.parameters[index]
        return DTensor.from_local(
            tensor, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def reshard(self) -> None:
        """Let the module hold shards: where it was called outside of the engine, it may hold whole parameters."""
        for part in self._parts:
            part.reshard()


class ShardedView(LevelView):
    """A sharded level as a loss sees it: to be called, its parameters are not at hand."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return _no_parameter(super().__getattr__(name), f".{name}")

    def __getitem__(self, key: Any) -> Any:
        return _no_parameter(super().__getitem__(key), f"[{key!r}]")


def refuse_reads(nodes: Iterable[Any]) -> None:
    """Refuse a loss that was made of shards themselves, given the operations that it was made by.

    Raises:
        GraphError: a parameter was read, and not by FSDP.
    """
    for node in nodes:
        if _is_distributed(getattr(node, "variable", None)):
            raise GraphError(_READ.format("a parameter"))


def _no_parameter(value: Any, read: str) -> Any:
    if isinstance(value, nn.Parameter) or read in (".parameters", ".named_parameters"):
        raise GraphError(_READ.format(read))
    return value


_READ = (
    "a loss reads {} of a level that is sharded by fully_shard; expected it to call the module, as FSDP gathers "
    "parameters, and their gradients, in calls alone. Compute what is needed in its forward."
)


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 shards parameters of the module."""
    return bool(_fsdp_modules(module))


def find_variables(module: nn.Module) -> Variables:
    """Return the trainable parameters of a module, sharded or not."""
    return ShardedVariables(module) if is_sharded(module) else Variables(module)


def find_group(modules: Sequence[nn.Module]) -> Group:
    """Return the processes that the modules are sharded over, None if none of them is.

    Raises:
        GraphError: they are not the same for all sharded modules.
    """
    groups = [ShardedVariables(module).group for module in modules if is_sharded(module)]
    ranks = [torch.distributed.get_process_group_ranks(group) for group in groups]
    if any(r != ranks[0] for r in ranks):
        raise GraphError(f"expected all levels sharded over the same processes; found ranks {ranks}")
    return groups[0] if groups else None


def check_shards(name: str, module: nn.Module) -> None:
    """Refuse parameters that are distributed over processes in a way that is not handled here.

    Raises:
        GraphError: naming the level and the parameter.
    """
    parts = _fsdp_modules(module)
    for part in parts:
        part.reshard()
    for key, p in module.named_parameters():
        distributed = type(p).__module__.startswith("torch.distributed")
        fully = _is_distributed(p) and _mesh(p).ndim == 1
        if (distributed or (parts and p.requires_grad)) and not (parts and fully):
            raise GraphError(
                f"level {name!r}: expected parameters that are whole, or all of them sharded by fully_shard over a "
                f"mesh of one dimension; found {key}, a {type(p).__name__}. Other values of it could not be put in its "
                f"place, and the hypergradients would be wrong."
            )


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is here: a shard of a `DTensor`, anything else itself."""
    part: Any = tensor
    return part.to_local() if _is_distributed(tensor) else tensor


def whole(tree: Any) -> Any:
    """Replace all `DTensor`s in a tree by whole tensors; all processes call it together."""

    def full(tensor: Any) -> Any:
        return tensor.full_tensor() if _is_distributed(tensor) else tensor

    return map_tensors(tree, full)


def distributed_like(tensor: Any, like: Any) -> Any:
    """Distribute a whole tensor as another one is, if that is a `DTensor`; all processes call it together."""
    if not _is_distributed(like) or not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    return distribute_tensor(tensor.to(_mesh(like).device_type), _mesh(like), like.placements)


def _fsdp_modules(module: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it has not been imported, nothing is sharded
    return [] if fsdp is None else [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]


def _is_distributed(value: Any) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # likewise
    return distributed is not None and isinstance(value, distributed.DTensor)


def _mesh(tensor: Any) -> Any:
    return tensor.device_mesh


@torch.no_grad()
def _write(shards: Tensors, tensors: Tensors) -> None:
    for shard, t in zip(shards, tensors, strict=True):
        shard.copy_(t)
